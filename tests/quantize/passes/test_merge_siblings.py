from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qpass
from interpret import operators
from pass_run import run_once
from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, WEIGHT_ONLY, Do, kernel_names, run_stages
from qpass.ir.record import record_of
from qpass.presets import int8_static
from qpass.quantize.passes.merge_siblings import MergeSiblings
from qpass.spec.config import Config
from qpass.targets import X86

SIBLINGS = {"a": nn.Linear(16, 8), "b": nn.Linear(16, 4), "c": nn.Linear(16, 8)}


def quantized(function: Callable[..., Any], *inputs: Tensor, config: Config = STATIC, **members: Any) -> fx.GraphModule:
    prepared = qpass.prepare(Do(function, **members).eval(), inputs, config=config)
    with torch.no_grad():
        prepared(*inputs)
    return qpass.convert(prepared)


def test_sibling_linears_become_one() -> None:
    x = torch.randn(4, 16)
    gm = quantized(lambda m, x: (m.a(x), m.b(x), m.c(x)), x, **SIBLINGS)
    before = gm(x)
    assert operators(gm).splitlines()[3:] == [
        "inputs_0 = input",
        "quantize_per_tensor = quantize_per_tensor(inputs_0, s, z, 0, 255, uint8)",
        "dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, s, z, 0, 255, uint8)",
        "linear = linear(dequantize_per_tensor, dequantize_per_channel, a.bias)",
        "linear_1 = linear(dequantize_per_tensor, dequantize_per_channel_1, b.bias)",
        "linear_2 = linear(dequantize_per_tensor, dequantize_per_channel_2, c.bias)",
        "return [linear, linear_1, linear_2]",
    ]
    assert run_once(MergeSiblings(X86), gm, x) == 1
    assert operators(gm).splitlines() == [
        "inputs_0 = input",
        "quantize_per_tensor = quantize_per_tensor(inputs_0, s, z, 0, 255, uint8)",
        "dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, s, z, 0, 255, uint8)",
        "cat = cat([a.weight_codes, b.weight_codes, c.weight_codes])",
        "cat_1 = cat([a.weight_scale, b.weight_scale, c.weight_scale])",
        "cat_2 = cat([a.weight_zero_point, b.weight_zero_point, c.weight_zero_point])",
        "dequantize_per_channel_3 = dequantize_per_channel(cat, cat_1, cat_2, 0, -127, 127, int8)",
        "cat_3 = cat([a.bias, b.bias, c.bias])",
        "linear = linear(dequantize_per_tensor, dequantize_per_channel_3, cat_3)",
        "slice_tensor = slice.Tensor(linear, -1, 0, 8)",
        "slice_tensor_1 = slice.Tensor(linear, -1, 8, 12)",
        "slice_tensor_2 = slice.Tensor(linear, -1, 12, 20)",
        "return [slice_tensor, slice_tensor_1, slice_tensor_2]",
    ]
    for merged, alone in zip(gm(x), before, strict=True):
        # The same 16 products a result; a wider float GEMM may sum them in another order: 16 * 2**-24 * 16 * 1.
        torch.testing.assert_close(merged, alone, atol=2e-5, rtol=0)
    (linear,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    record = record_of(linear)
    assert record is not None
    assert (record.outcome, record.reason, record.size) == ("quantized", "one GEMM", 3)


@pytest.mark.parametrize("config", [STATIC, PER_TENSOR, PER_TOKEN], ids=["static", "tensor", "token"])
@pytest.mark.parametrize("bias", [True, False])
def test_on_the_whole_road_the_siblings_run_in_one_kernel(config: Config, bias: bool) -> None:
    members = {name: nn.Linear(16, size, bias=bias) for name, size in (("a", 8), ("b", 4), ("c", 8))}
    r = run_stages(
        Do(lambda m, x: (m.a(x), torch.tanh(m.b(x)), m.c(x)), **members), torch.randn(2, 3, 16), config=config
    )
    assert len(kernel_names(r.lowered)) == 1
    assert [kernel.kernel for kernel in r.kernels] == ["slice.Tensor"] * 3


def test_results_that_a_float_reader_wants_in_bfloat16_are_cast_once() -> None:
    def attention(m: Any, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(m.a(x), m.b(x), m.c(x))

    x, members = torch.randn(2, 3, 16), {name: nn.Linear(16, 8) for name in "abc"}
    r = run_stages(Do(attention, **members), x, config=int8_static(compute_dtype=torch.bfloat16))
    assert kernel_names(r.lowered) == ["onednn.qlinear one GEMM, with cast to bfloat16"]
    assert len(r.kernels) == 3


NOT_SIBLINGS: dict[str, tuple[Callable[[Any, Tensor], Any], Config]] = {
    "other inputs": (lambda m, x: (m.a(x), m.c(torch.sin(x))), STATIC),
    "fused": (lambda m, x: (m.a(x), torch.relu(m.c(x))), STATIC),
    "rounded": (lambda m, x: (m.a(x), m.d(m.c(x))), STATIC),
    "one bias": (lambda m, x: (m.a(x), m.plain(x)), STATIC),
    "float activations": (lambda m, x: (m.a(x), m.c(x)), WEIGHT_ONLY),
    "one in float": (lambda m, x: (m.a(x), m.c(x)), STATIC.keep_float(module="c")),
}


@pytest.mark.parametrize("name", NOT_SIBLINGS)
def test_near_misses(name: str) -> None:
    function, config = NOT_SIBLINGS[name]
    members = {"d": nn.Linear(8, 8), "plain": nn.Linear(16, 8, bias=False), **SIBLINGS}
    x = torch.randn(4, 16)
    gm = quantized(function, x, config=config, **members)
    before = operators(gm)
    assert run_once(MergeSiblings(X86), gm, x) == 0
    assert operators(gm) == before


def test_one_weight_used_twice() -> None:
    r = run_stages(Do(lambda m, x: (m.a(x), m.a(x)), a=nn.Linear(16, 8)), torch.randn(4, 16))
    assert len(kernel_names(r.lowered)) == 1
    first, second = r.lowered(x := torch.randn(4, 16))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, r.quantized(x)[0], atol=2e-5, rtol=0)  # the order of 16 products, as above


def test_two_groups_of_siblings() -> None:
    members = {name: nn.Linear(16, 16) for name in "abcd"}
    r = run_stages(Do(lambda m, x: (m.a(x), m.b(x), m.c(y := torch.sin(x)), m.d(y)), **members), torch.randn(4, 16))
    assert len(kernel_names(r.lowered)) == 2
