from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline_run import Do
from qpass.capture.export import capture
from qpass.islands.views import JOINS, MONOTONE, MOVES, carried
from qpass.ops import graph_ops as ops

QPARAMS = (0.1, 7, 0, 255, torch.uint8)

EXAMPLES: dict[str, Callable[[Tensor], Tensor]] = {
    "view.default": lambda x: x.view(2, -1),
    "reshape.default": lambda x: x.reshape(4, -1),
    "_unsafe_view.default": lambda x: torch.ops.aten._unsafe_view(x, [8, 36]),
    "flatten.using_ints": lambda x: x.flatten(1),
    "unflatten.int": lambda x: x.unflatten(1, (2, 2)),
    "transpose.int": lambda x: x.transpose(1, 3),
    "t.default": lambda x: torch.ops.aten.t(x[0, 0]),
    "permute.default": lambda x: x.permute(0, 2, 3, 1),
    "unsqueeze.default": lambda x: x.unsqueeze(1),
    "squeeze.default": lambda x: x[:, :1].squeeze(),
    "squeeze.dim": lambda x: x[:, :1].squeeze(1),
    "squeeze.dims": lambda x: x[:1, :1].squeeze((0, 1)),
    "slice.Tensor": lambda x: x[:, 1:3],
    "select.int": lambda x: x[:, 1],
    "expand.default": lambda x: x[:, :1].expand(-1, 4, -1, -1),
    "contiguous.default": lambda x: x.transpose(1, 3).contiguous(),
    "clone.default": lambda x: x.clone(),
    "movedim.int": lambda x: torch.ops.aten.movedim.int(x, 1, 3),
    "narrow.default": lambda x: torch.ops.aten.narrow.default(x, 1, 1, 2),
    "pixel_shuffle.default": lambda x: F.pixel_shuffle(x, 2),
    "numpy_T.default": lambda x: torch.ops.aten.numpy_T.default(x[0, 0]),
    "mT.default": lambda x: torch.ops.aten.mT.default(x),
    "detach.default": lambda x: torch.ops.aten.detach.default(x),
    "alias.default": lambda x: torch.ops.aten.alias.default(x),
    "max_pool1d.default": lambda x: torch.ops.aten.max_pool1d(x[0], 2),
    "max_pool2d.default": lambda x: torch.ops.aten.max_pool2d(x, 2),
    "max_pool3d.default": lambda x: torch.ops.aten.max_pool3d(x, 2),
    "cat.default": lambda x: torch.cat([x, x.flip(0)], 1),
}


def name(op: torch._ops.OpOverload) -> str:
    return f"{op._schema.name.partition('::')[2]}.{op._overloadname}"


def test_every_operator_has_an_example_here() -> None:
    assert {name(op) for op in MOVES | MONOTONE | JOINS} == set(EXAMPLES)


@pytest.mark.parametrize("op", EXAMPLES)
def test_codes_pass_through_bit_for_bit(op: str) -> None:
    """``f(dq(q)) == dq(f(q))``, which is what each table promises of ``f``."""
    codes = torch.randint(256, (2, 4, 6, 6), dtype=torch.uint8)
    f = EXAMPLES[op]
    values = f(ops.dequantize_per_tensor.default(codes, *QPARAMS))
    moved = f(codes.float()).to(torch.uint8) if "max_pool" in op else f(codes)
    assert torch.equal(values, ops.dequantize_per_tensor.default(moved, *QPARAMS))


def test_what_is_carried() -> None:
    model = Do(lambda m, x, y: torch.cat([x.transpose(0, 1), torch.sin(y)]))
    gm = capture(model, (torch.randn(4, 4), torch.randn(4, 4)))
    found = {node.name: [source.name for source in carried(node)] for node in gm.graph.nodes if carried(node)}
    assert found == {"transpose": ["inputs_0"], "cat": ["transpose", "sin"]}
