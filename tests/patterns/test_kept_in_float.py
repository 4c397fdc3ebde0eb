"""What the catalogue leaves in floating point on purpose: the record of each says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pipeline_run import Do, decisions
from qpass.quantize.passes.annotate import uncovered

ATTENTION = (
    "attention multiplies two activations, whose codes would have to be packed at run time; "
    "in bfloat16 the fused kernel is faster and loses nothing to rounded probabilities"
)
PROBABILITIES = "probabilities span many orders of magnitude; 8 bits would flush the small ones to zero"
STATISTICS = "a normalization computes statistics of its input; it is fused with the rounding behind it instead"
FOLLOWS = "a batch norm that does not directly follow a quantized convolution is not folded"
LOOP = "element by element: Inductor fuses it into the loops around it"

KEPT: list[tuple[str, Callable[[Any, Tensor], Tensor], str]] = [
    ("scaled_dot_product_attention", lambda m, x: F.scaled_dot_product_attention(x, x, x), ATTENTION),
    ("bmm", lambda m, x: torch.bmm(x, x), ATTENTION),
    ("baddbmm", lambda m, x: torch.baddbmm(x, x, x), ATTENTION),
    ("softmax.int", lambda m, x: x.softmax(-1), PROBABILITIES),
    ("layer_norm", lambda m, x: F.layer_norm(x, (8,)), STATISTICS),
    ("group_norm", lambda m, x: F.group_norm(x, 2), STATISTICS),
    ("rms_norm", lambda m, x: F.rms_norm(x, (8,)), STATISTICS),
    ("batch_norm", lambda m, x: m.norm(x), FOLLOWS),
    ("tanh", lambda m, x: torch.tanh(x), LOOP),
    ("cumsum", lambda m, x: x.cumsum(-1), "no pattern of the catalogue covers it"),
]


@pytest.mark.parametrize(("op", "function", "expected"), KEPT, ids=[op for op, _, _ in KEPT])
def test_the_record_says_why(op: str, function: Callable[[Any, Tensor], Tensor], expected: str) -> None:
    model = Do(lambda m, x: m.fc(function(m, x)), fc=nn.Linear(8, 8), norm=nn.BatchNorm1d(8))
    found = decisions(model, torch.randn(4, 8, 8))
    assert (found[op].outcome, found[op].reason, found[op].asked) == ("float", expected, False)
    assert found["linear"].outcome == "quantized"


def test_a_fused_encoder_layer_says_how_to_take_it_apart() -> None:
    """Dynamo alone meets it: an export traces the layer's parts."""
    fused = fx.Graph().call_function(torch.ops.aten._transformer_encoder_layer_fwd.default)
    assert uncovered(fused).reason.endswith("torch.backends.mha.set_fastpath_enabled(False) before it is compiled")
