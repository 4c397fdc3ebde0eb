"""What "exact" means, measured on whole models: prepared is the float model bit for bit, lowered is the q/dq reference.

Lowered and reference are compared kernel by kernel on equal inputs (see `kernel_comparison`). At their ends they are
compared by SQNR alone. A code that falls differently at a rounding tie is one step away, and later layers amplify it.
So two correct programs may return different numbers. Neither may be further from the float model than the other.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from interpret import assert_true_vals
from kernel_comparison import compare_kernels
from models import MODELS, fresh_inputs
from pipeline_run import PER_TOKEN, STATIC, Do, kernel_names, same
from qpass.ir.editor import Editor
from qpass.islands.island import IslandMatch
from qpass.presets import int8_dynamic, int8_static, int8_weight_only
from qpass.spec.config import Config
from qpass.targets import Output
from qpass.targets.x86 import linear
from qpass.targets.x86.packing import packed

CONFIGS: dict[str, Config] = {
    "static": STATIC,
    "static, bfloat16": int8_static(compute_dtype=torch.bfloat16),
    "per token": PER_TOKEN,
    "per tensor, bfloat16": int8_dynamic("tensor", compute_dtype=torch.bfloat16),
    "weight only": int8_weight_only(compute_dtype=torch.bfloat16),
}
CONVOLUTIONAL = ("resnet50", "mobilenet_v2", "audio_conv")  # dynamic configurations quantize one linear of each
CASES = [(name, config) for config in CONFIGS for name in MODELS if "static" in config or name not in CONVOLUTIONAL]
Stages = tuple[nn.Module, tuple[Tensor, ...], fx.GraphModule, fx.GraphModule, fx.GraphModule]


@functools.cache
def stages(name: str, config: str) -> Stages:
    """The model, its inputs, and the model prepared, quantized and lowered: made once for all tests of this file."""
    model, inputs = MODELS[name]("tiny")
    prepared = qpass.prepare(model, inputs, config=CONFIGS[config])
    qpass.calibrate(prepared, [inputs, *(fresh_inputs(inputs, seed) for seed in (1, 2))])
    quantized = qpass.convert(prepared)
    return model, inputs, prepared, quantized, qpass.lower(quantized)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_observers_change_nothing(name: str, config: str) -> None:
    model, inputs, prepared, _, _ = stages(name, config)
    with torch.no_grad():
        for batch in (inputs, fresh_inputs(inputs, seed=3)):
            assert same(prepared(*batch), model(*batch))


@pytest.mark.parametrize(("name", "config"), CASES)
def test_weights_are_stored_as_codes(name: str, config: str) -> None:
    model, inputs, prepared, quantized, lowered = stages(name, config)
    for gm in (prepared, quantized, lowered):
        assert_true_vals(gm, *inputs)
    state = quantized.state_dict()
    codes = {key: tensor for key, tensor in state.items() if key.endswith("_codes") or "_codes_" in key}
    assert codes
    assert {tensor.dtype for tensor in codes.values()} == {torch.int8}
    matrices = [tensor for tensor in model.state_dict().values() if tensor.dim() > 1 and tensor.is_floating_point()]
    rounded = sum(tensor.numel() for tensor in codes.values())
    # Positions, rotary angles and class tokens are no weights of a product; they are at most a third of these models.
    assert rounded > sum(tensor.numel() for tensor in matrices) * 2 / 3
    assert sum(t.numel() * t.element_size() for t in state.values()) < 0.6 * sum(
        t.numel() * t.element_size() for t in model.state_dict().values()
    )


@pytest.mark.parametrize(("name", "config"), CASES)
def test_every_kernel_obeys_the_law(name: str, config: str) -> None:
    _, inputs, _, quantized, lowered = stages(name, config)
    compared = compare_kernels(quantized, *fresh_inputs(inputs, seed=4))
    kernels = Counter(str(n.target) for n in lowered.graph.nodes if getattr(n.target, "namespace", "") == "onednn")
    assert len(compared) >= max(kernels.total(), 1)


@pytest.mark.parametrize(("name", "config"), CASES)
def test_lowering_costs_no_accuracy(name: str, config: str) -> None:
    model, inputs, _, quantized, lowered = stages(name, config)
    batches = [fresh_inputs(inputs, seed) for seed in (5, 6)]
    reference, result = qpass.sqnr(model, quantized, batches), qpass.sqnr(model, lowered, batches)
    assert reference > 20  # these models lie at 26 to 39 dB; one wrong scale brings them below 6
    # A weight alone: each kernel rounds its sum to bfloat16 once more, which costs these models up to 0.6 dB.
    assert abs(result - reference) < (1 if config == "weight only" else 0.5)


# The judge is judged: it must notice an error of one part in two thousand, and of one weight's code.


def wrong_scale(self: linear.Qlinear, m: IslandMatch) -> Output:
    right = linear.requantized_output(m)
    return right if right.dtype.is_floating_point else replace(right, scale=right.scale * 1.0005)


def wrong_code(m: IslandMatch, edit: Editor, before: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    def pack(codes: Tensor) -> Tensor:
        changed = codes.clone()
        changed[0, 0] += 1
        return torch.ops.onednn.qlinear_prepack(changed, None)

    return packed(m, pack, "wrong", edit, before)


@pytest.mark.parametrize(
    ("owner", "name", "wrong", "expected"),
    [
        (linear.Qlinear, "output", wrong_scale, "rounds quantize_per_tensor_default_1 differently"),
        (linear, "pack_linear", wrong_code, "onednn.qlinear_pointwise"),
    ],
)
def test_a_kernel_that_is_a_little_wrong_is_noticed(
    owner: Any, name: str, wrong: Any, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(64, 16)
    prepared = qpass.prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), (x,), config=STATIC)
    prepared(x)
    quantized = qpass.convert(prepared)
    assert len(compare_kernels(quantized, x)) == 2
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(AssertionError, match=expected):
        compare_kernels(quantized, x)


# What Inductor makes of a lowered graph is tested where the backend is; three small models here close the chain.

COMPILED: dict[str, tuple[nn.Module, Tensor, Config, list[str]]] = {
    "static": (
        nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(4, 16), STATIC,
        ["onednn.qlinear with relu, quantize", "onednn.qlinear"],
    ),
    "convolution in one dimension": (
        nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Hardswish(), nn.Conv1d(6, 4, 3)), torch.randn(2, 4, 12),
        STATIC, ["onednn.qconv with hardswish, quantize", "onednn.qconv"],
    ),
    "per token": (
        Do(lambda m, x: torch.tanh(m.a(x)), a=nn.Linear(16, 8)), torch.randn(4, 16), PER_TOKEN,
        ["onednn.qlinear (per token)"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_it_is_still_the_reference(name: str) -> None:
    model, x, config, kernels = COMPILED[name]
    prepared = qpass.prepare(model.eval(), (x,), config=config)
    with torch.no_grad():
        prepared(x)
        quantized = qpass.convert(prepared)
        compiled: Any = torch.compile(quantized, backend="qpass")
        result, reference = compiled(x), quantized(x)
    assert kernel_names(qpass.lower(quantized)) == kernels
    # Sums of at most 18 products of values below 4, in another order: 18 * 2**-24 * 72. No code lies on a tie here.
    torch.testing.assert_close(result, reference, atol=1e-4, rtol=0)
