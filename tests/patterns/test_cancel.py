from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from interpret import operators
from pipeline_run import Do
from qpass.capture.export import capture
from qpass.ir.rule import apply_rules
from qpass.ops import graph_ops as ops
from qpass.patterns.cancel import Requantize

FIRST = (0.1, 3, 0, 255, torch.uint8)


def twice(*second: object) -> fx.GraphModule:
    """``q(dq(q(x)))``, the second time with other qparams."""

    def function(m: Do, x: Tensor) -> Tensor:
        values = ops.dequantize_per_tensor.default(ops.quantize_per_tensor.default(x, *FIRST), *FIRST)
        return ops.quantize_per_tensor.default(values, *second)

    return capture(Do(function), (torch.randn(4, 8),))


def test_the_same_rounding_twice_is_rounding_once() -> None:
    gm, x = twice(*FIRST), 20 * torch.randn(4, 8)
    before = gm(x)
    applied = apply_rules(gm, [Requantize()], "cancel")
    gm.graph.eliminate_dead_code()
    gm.recompile()
    assert applied.fired == {"Requantize": 1}
    assert (
        operators(gm)
        == """\
inputs_0 = input
quantize_per_tensor = quantize_per_tensor(inputs_0, 0.1, 3, 0, 255, uint8)
return [quantize_per_tensor]"""
    )
    assert torch.equal(gm(x), before)
    assert apply_rules(gm, [Requantize()], "cancel").count == 0


@pytest.mark.parametrize(
    "second",
    [(0.2, 3, 0, 255, torch.uint8), (0.1, 4, 0, 255, torch.uint8), (0.1, 3, 0, 127, torch.uint8)],
    ids=["scale", "zero point", "range"],
)
def test_other_qparams_are_declined(second: tuple[object, ...]) -> None:
    gm = twice(*second)
    applied = apply_rules(gm, [Requantize()], "cancel")
    assert applied.count == 0
    assert applied.nearest_miss == (
        "Requantize declined quantize_per_tensor_1: the two roundings have different qparams"
    )


def test_a_value_that_was_never_codes_is_declined() -> None:
    applied = apply_rules(
        capture(Do(lambda m, x: ops.quantize_per_tensor.default(x, *FIRST).float()), (torch.randn(4, 8),)),
        [Requantize()], "cancel",
    )  # fmt: skip
    assert [reason for _, _, reason in applied.refused] == ["the quantized value is not a dequantized one"]


@pytest.mark.parametrize(("low", "high", "dtype"), [(0, 255, torch.uint8), (-127, 127, torch.int8)])
def test_every_code_comes_back(low: int, high: int, dtype: torch.dtype) -> None:
    """What the rule claims, on every code and scales over 30 orders of magnitude."""
    codes = torch.arange(low, high + 1).to(dtype)
    for scale in torch.logspace(-20, 10, 301).tolist():
        for zero_point in (low, high, 3):
            qparams = (scale, zero_point, low, high, dtype)
            values = ops.dequantize_per_tensor.default(codes, *qparams)
            assert torch.equal(ops.quantize_per_tensor.default(values, *qparams), codes)
