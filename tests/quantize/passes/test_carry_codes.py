from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from interpret import operators
from pass_run import run_once
from pipeline_run import Do, run_stages
from qpass.capture.export import capture
from qpass.ir.record import record_of
from qpass.ops import graph_ops as ops
from qpass.quantize.passes.carry_codes import CarryCodes

FIRST = (0.1, 7, 0, 255, torch.uint8)
SECOND = (0.2, 7, 0, 255, torch.uint8)


def rounded(x: Tensor, qparams: tuple[Any, ...] = FIRST) -> Tensor:
    codes = ops.quantize_per_tensor.default(x, *qparams)
    return ops.dequantize_per_tensor.default(codes, *qparams)


def captured(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    return capture(Do(lambda m, *given: function(*given)), inputs)


IMAGE = torch.linspace(-2, 30, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)


def test_views_move_codes() -> None:
    gm = captured(lambda x: rounded(x).flatten(1), IMAGE)
    before = gm(IMAGE)
    assert operators(gm).splitlines()[1:] == [
        "quantize_per_tensor = quantize_per_tensor(inputs_0, 0.1, 7, 0, 255, uint8)",
        "dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, 0.1, 7, 0, 255, uint8)",
        "flatten = flatten.using_ints(dequantize_per_tensor, 1)",
        "return [flatten]",
    ]
    assert run_once(CarryCodes(), gm, IMAGE) == 1
    assert operators(gm).splitlines()[1:] == [
        "quantize_per_tensor = quantize_per_tensor(inputs_0, 0.1, 7, 0, 255, uint8)",
        "flatten_using_ints = flatten.using_ints(quantize_per_tensor, 1)",
        "dequantize_per_tensor = dequantize_per_tensor(flatten_using_ints, 0.1, 7, 0, 255, uint8)",
        "return [dequantize_per_tensor]",
    ]
    assert torch.equal(gm(IMAGE), before)


CHAINS: dict[str, Callable[[Tensor], Tensor]] = {
    "views": lambda x: x.transpose(1, 2).reshape(2, -1)[:, 3:],
    "permute": lambda x: x.permute(0, 2, 3, 1).contiguous(),
    "max pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max pool of a view": lambda x: F.max_pool2d(x[:, 1:], 2).flatten(1),
    "cat": lambda x: torch.cat([x, x[:, :2]], 1),
}


@pytest.mark.parametrize("chain", CHAINS)
def test_a_rounding_behind_the_move_cancels(chain: str) -> None:
    gm = captured(lambda x: rounded(CHAINS[chain](rounded(x))), IMAGE)
    before = gm(IMAGE)
    assert run_once(CarryCodes(), gm, IMAGE) >= 2
    text = operators(gm)
    assert (text.count("= quantize_per_tensor("), text.count("= dequantize_per_tensor(")) == (1, 1)
    assert text.splitlines()[-2].startswith("dequantize_per_tensor")
    assert torch.equal(gm(IMAGE), before)


def test_codes_pass_through_max_pooling_as_float() -> None:
    """ATen's max pooling of bytes refuses images of more than 127 pixels, and float32 holds every code."""
    gm = captured(lambda x: F.max_pool2d(rounded(x), 2), IMAGE)
    run_once(CarryCodes(), gm, IMAGE)
    assert operators(gm).splitlines()[2:5] == [
        "to_dtype = to.dtype(quantize_per_tensor, float32)",
        "max_pool2d = max_pool2d(to_dtype, [2, 2])",
        "to_dtype_1 = to.dtype(max_pool2d, uint8)",
    ]
    moved = next(node for node in gm.graph.nodes if (record := record_of(node)) and record.outcome == "exact")
    assert record_of(moved).reason == "moves codes"  # type: ignore[union-attr]


def test_a_concatenation_of_one_scale_is_a_concatenation_of_codes() -> None:
    gm = captured(lambda x, y: torch.cat([rounded(x), rounded(y)], 1), IMAGE, IMAGE / 2)
    before = gm(IMAGE, IMAGE / 2)
    assert run_once(CarryCodes(), gm, IMAGE, IMAGE / 2) == 1
    assert operators(gm).splitlines()[-3:] == [
        "cat = cat([quantize_per_tensor, quantize_per_tensor_1], 1)",
        "dequantize_per_tensor = dequantize_per_tensor(cat, 0.1, 7, 0, 255, uint8)",
        "return [dequantize_per_tensor]",
    ]
    assert torch.equal(gm(IMAGE, IMAGE / 2), before)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.cat([rounded(x), rounded(x, SECOND)], 1),  # two scales
        lambda x: torch.cat([rounded(x), x], 1),  # one input was never rounded
        lambda x: F.avg_pool2d(rounded(x), 2),  # makes new values
        lambda x: F.pad(rounded(x), [1, 1]),  # the zero that it adds is not the code zero
    ],
)
def test_what_codes_do_not_pass(function: Callable[[Tensor], Tensor]) -> None:
    gm = captured(function, IMAGE)
    before = operators(gm)
    assert run_once(CarryCodes(), gm, IMAGE) == 0
    assert operators(gm) == before


def test_wide_codes_are_not_pooled() -> None:
    wide = (0.001, 0, -32768, 32767, torch.int16)
    gm = captured(lambda x: F.max_pool2d(rounded(x, wide), 2), IMAGE)
    assert CarryCodes().run(gm).changed == 0


def test_who_reads_the_values_before_the_move_still_does() -> None:
    gm = captured(lambda x: (torch.sin(y := rounded(x)), y.flatten(1)), IMAGE)
    before = gm(IMAGE)
    assert run_once(CarryCodes(), gm, IMAGE) == 1
    assert all(torch.equal(a, b) for a, b in zip(gm(IMAGE), before, strict=True))
    assert operators(gm).count("= dequantize_per_tensor(") == 2


def test_dynamic_codes_stay_where_they_are() -> None:
    """Their scales belong to a tensor; per token, to rows that a view would break up."""

    def dynamic(x: Tensor) -> Tensor:
        scale, zero_point = ops.choose_qparams_per_token.default(x, torch.int8)
        codes = ops.quantize_per_token.default(x, scale, zero_point, -127, 127, torch.int8)
        return ops.dequantize_per_token.default(codes, scale, zero_point, -127, 127, torch.int8, torch.float32)

    assert CarryCodes().run(captured(lambda x: dynamic(x).flatten(1), IMAGE)).changed == 0


def test_from_one_convolution_to_the_next() -> None:
    model = Do(lambda m, x: m.b(torch.cat([F.max_pool2d(m.a(x), 2), F.max_pool2d(m.c(x), 2)], 1)),
               a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(8, 4, 3), c=nn.Conv2d(4, 4, 3))  # fmt: skip
    text = operators(run_stages(model, torch.randn(2, 4, 9, 9)).lowered)
    assert "dequantize" not in text  # the concatenation's inputs share one scale, although the pooling is between
    assert text.count("quantize_per_tensor(") == 1
