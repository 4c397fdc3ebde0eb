from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpret import operators
from pipeline_run import (
    PER_TENSOR,
    PER_TOKEN,
    STATIC,
    WEIGHT_BFLOAT16,
    WEIGHT_ONLY,
    Do,
    decisions,
    kernel_names,
    reason,
    run_stages,
)
from qpass.presets import int8_static, int8_weight_only
from qpass.spec import PerChannel, PerTensor, PerToken, QuantizationSpec
from qpass.spec.config import Config

CONFIGS = [STATIC, PER_TENSOR, PER_TOKEN, WEIGHT_BFLOAT16]
INT8_WEIGHT = QuantizationSpec(torch.int8, PerChannel(0))


def linear() -> nn.Linear:
    return nn.Linear(16, 8)


def test_static() -> None:
    r = run_stages(linear(), torch.randn(4, 16))
    assert (
        operators(r.prepared)
        == """\
observer_1 = observer_1(weight)
input_1 = input
observer_0 = observer_0(input_1)
linear = linear(observer_0, observer_1, bias)
return [linear]"""
    )
    assert (
        operators(r.quantized)
        == """\
dequantize_per_channel = dequantize_per_channel(codes(weight), 0, -127, 127, int8)
input_1 = input
quantize_per_tensor = quantize_per_tensor(input_1, s, z, 0, 255, uint8)
dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, s, z, 0, 255, uint8)
linear = linear(dequantize_per_tensor, dequantize_per_channel, bias)
return [linear]"""
    )
    kernel = "onednn.qlinear_pointwise(quantize_per_tensor, s, z, packed(weight), bias, 1, 0, float32, none, [], none)"
    assert (
        operators(r.lowered)
        == f"""\
input_1 = input
quantize_per_tensor = quantize_per_tensor(input_1, s, z, 0, 255, uint8)
qlinear_pointwise = {kernel}
return [qlinear_pointwise]"""
    )


def test_dynamic_per_token() -> None:
    r = run_stages(linear(), torch.randn(4, 16), config=PER_TOKEN)
    assert (
        operators(r.quantized)
        == """\
dequantize_per_channel = dequantize_per_channel(codes(weight), 0, -127, 127, int8)
input_1 = input
choose_qparams_per_token = choose_qparams_per_token(input_1, int8)
getitem = getitem(choose_qparams_per_token, 0)
getitem_1 = getitem(choose_qparams_per_token, 1)
quantize_per_token = quantize_per_token(input_1, getitem, getitem_1, -127, 127, int8)
dequantize_per_token = dequantize_per_token(quantize_per_token, getitem, getitem_1, -127, 127, int8, float32)
linear = linear(dequantize_per_token, dequantize_per_channel, bias)
return [linear]"""
    )
    kernel = "onednn.qlinear_pointwise(bitwise_xor_scalar, 1, 128, packed(weight), None, 1, 0, float32, none, [], )"
    assert operators(r.lowered).splitlines()[5:] == [
        "view_dtype = view.dtype(quantize_per_token, uint8)",
        "bitwise_xor_scalar = bitwise_xor.Scalar(view_dtype, 128)",
        f"qlinear_pointwise = {kernel}",
        "mul_tensor = mul.Tensor(qlinear_pointwise, getitem)",
        "add_tensor = add.Tensor(mul_tensor, bias)",
        "return [add_tensor]",
    ]


def test_dynamic_per_tensor() -> None:
    r = run_stages(linear(), torch.randn(4, 16), config=PER_TENSOR)
    kernel = (
        "onednn.qlinear_pointwise.tensor(quantize_per_tensor_tensor, getitem, getitem_1, packed(weight), bias, "
        "1, 0, float32, none, [], none)"
    )
    assert (
        operators(r.lowered)
        == f"""\
input_1 = input
choose_qparams_tensor = choose_qparams.tensor(input_1, 0, 255, 1.19209e-07, uint8)
getitem = getitem(choose_qparams_tensor, 0)
getitem_1 = getitem(choose_qparams_tensor, 1)
quantize_per_tensor_tensor = quantize_per_tensor.tensor(input_1, getitem, getitem_1, 0, 255, uint8)
qlinear_pointwise_tensor = {kernel}
return [qlinear_pointwise_tensor]"""
    )


def test_a_weight_alone_in_float32_is_dequantized_and_the_report_says_so() -> None:
    """The packed kernel multiplies float32 rows in scalar code, at a quarter of the speed of float32 or less."""
    r = run_stages(linear(), torch.randn(4, 16), config=WEIGHT_ONLY)
    assert (
        operators(r.lowered)
        == operators(r.quantized)
        == """\
dequantize_per_channel = dequantize_per_channel(codes(weight), 0, -127, 127, int8)
input_1 = input
linear = linear(input_1, dequantize_per_channel, bias)
return [linear]"""
    )
    why = "slower than in float: its rows are not rounded to bfloat16"
    assert kernel_names(r.lowered) == [f"linear on a dequantized weight {why}"]


def test_weight_only_in_groups() -> None:
    """No kernel reads groups: the weight is stored as codes and multiplied in float, and the record says so."""
    r = run_stages(linear(), torch.randn(4, 16), config=int8_weight_only(group_size=4, compute_dtype=None))
    assert (
        operators(r.lowered)
        == operators(r.quantized)
        == """\
dequantize_per_channel_group = dequantize_per_channel_group(codes(weight), -127, 127, int8, 4, float32)
input_1 = input
linear = linear(input_1, dequantize_per_channel_group, bias)
return [linear]"""
    )
    assert kernel_names(r.lowered) == ["linear on a dequantized weight"]


@pytest.mark.parametrize("config", CONFIGS, ids=["static", "tensor", "token", "w"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16,), (4, 16), (2, 3, 16), (2, 3, 5, 16)], ids=["1d", "2d", "3d", "4d"])
def test_inputs_of_every_rank(shape: tuple[int, ...], bias: bool, config: Config) -> None:
    r = run_stages(nn.Linear(16, 8, bias=bias), torch.randn(shape), config=config)
    assert len(r.kernels) == 1
    assert len(kernel_names(r.lowered)) == 1


@pytest.mark.parametrize("config", CONFIGS, ids=["static", "tensor", "token", "w"])
def test_the_batch_size_of_the_example_is_not_baked_in(config: Config) -> None:
    r = run_stages(linear(), torch.randn(4, 3, 16), config=config)
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 16)
        # 16 products of values below 4 with weights below 1/4, in another order of sums: errors below 32 * 2**-24 * 4.
        # A weight alone: the sum, of values below 4, is rounded to bfloat16.
        atol = 2**-8 * 4 if config is WEIGHT_BFLOAT16 else 1e-5
        torch.testing.assert_close(r.lowered(x), r.quantized(x), atol=atol, rtol=0)


ACTIVATIONS: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("relu", F.relu), ("gelu", F.gelu), ("gelu", lambda y: F.gelu(y, approximate="tanh")), ("silu", F.silu),
    ("hardswish", F.hardswish), ("relu6", F.relu6), ("relu6", nn.ReLU6()),
]  # fmt: skip


@pytest.mark.parametrize(("name", "activation"), ACTIVATIONS)
@pytest.mark.parametrize("config", [STATIC, PER_TENSOR], ids=["static", "dynamic"])
def test_activations_are_fused(name: str, activation: Callable[[Tensor], Tensor], config: Config) -> None:
    model = Do(lambda m, x: m.b(activation(m.a(4 * x))), a=linear(), b=nn.Linear(8, 8))
    r = run_stages(model, torch.randn(4, 16), config=config)
    rounded = ", quantize" if config is STATIC else ""
    assert kernel_names(r.lowered) == [f"onednn.qlinear with {name}{rounded}", "onednn.qlinear"]


def test_an_activation_no_kernel_knows_stays_behind_the_kernel() -> None:
    r = run_stages(Do(lambda m, x: torch.tanh(m.a(x)), a=linear()), torch.randn(4, 16))
    assert operators(r.lowered).splitlines()[-2:] == ["tanh = tanh(qlinear_pointwise)", "return [tanh]"]


@pytest.mark.parametrize("add", [lambda y, x: y + x, lambda y, x: x + y], ids=["linear first", "residual first"])
@pytest.mark.parametrize("config", [STATIC, PER_TENSOR], ids=["static", "dynamic"])
def test_a_residual_is_added_by_the_kernel(add: Callable[[Tensor, Tensor], Tensor], config: Config) -> None:
    model = Do(lambda m, x, y: torch.relu(add(m.a(x), y)), a=linear())
    r = run_stages(model, torch.randn(4, 16), torch.randn(4, 8), config=config)
    assert kernel_names(r.lowered) == ["onednn.qlinear with add, relu"]
    r = run_stages(Do(lambda m, x, y: add(m.a(x), y), a=linear()), torch.randn(16), torch.randn(8), config=config)
    assert kernel_names(r.lowered) == ["onednn.qlinear with add"]


def test_a_residual_that_broadcasts_is_not() -> None:
    model = Do(lambda m, x, y: m.a(x) + y, a=linear())
    inputs = torch.randn(4, 16), torch.randn(8)
    assert kernel_names(run_stages(model, *inputs).lowered) == ["onednn.qlinear"]
    assert decisions(model, *inputs)["add.Tensor"].reason == "the operands differ in shape"


def test_a_result_added_to_itself_is_not_a_residual() -> None:
    r = run_stages(Do(lambda m, x: (y := m.a(x)) + y, a=linear()), torch.randn(4, 16))
    assert kernel_names(r.lowered) == ["onednn.qlinear"]


def test_a_result_that_two_read_is_not_fused() -> None:
    r = run_stages(Do(lambda m, x: (torch.relu(y := m.a(x)), y), a=linear()), torch.randn(4, 16))
    assert kernel_names(r.lowered) == ["onednn.qlinear"]


@pytest.mark.parametrize(
    ("activation", "kernels"),
    [
        (QuantizationSpec(torch.int8, PerTensor(), symmetric=False), ["onednn.qlinear with relu, quantize"]),
        # Codes of 7 bits, and -127..127: the kernel would saturate at the ends of the byte, so it does not round.
        (QuantizationSpec(torch.uint8, PerTensor(), symmetric=False, quant_max=127), ["onednn.qlinear with relu"]),
        (QuantizationSpec(torch.int8, PerTensor(), symmetric=True), ["onednn.qlinear with relu"]),
    ],
)
def test_other_codes_of_activations(activation: QuantizationSpec, kernels: list[str]) -> None:
    model = nn.Sequential(linear(), nn.ReLU(), nn.Linear(8, 8))
    r = run_stages(model, torch.randn(4, 16), config=Config(activation=activation, weight=INT8_WEIGHT))
    assert kernel_names(r.lowered) == [*kernels, "onednn.qlinear"]


def test_a_float_reader_gets_bfloat16_from_the_kernel() -> None:
    model = Do(lambda m, x, y: m.a(x) @ y, a=linear())
    inputs = torch.randn(2, 4, 16), torch.randn(2, 8, 3)
    r = run_stages(model, *inputs, config=int8_static(compute_dtype=torch.bfloat16))
    assert kernel_names(r.lowered) == ["onednn.qlinear with cast to bfloat16"]
    assert r.lowered(*inputs).dtype == torch.float32


PER_CHANNEL = "the kernel takes one weight scale per output channel (axis 0)"
NEAR_MISSES: dict[str, tuple[nn.Module, int, Any, Any, str]] = {
    "computed weight": (
        Do(lambda m, x: F.linear(x, x[:8])), 16, STATIC.activation, STATIC.weight, "the weight is computed, not stored",
    ),
    "computed bias": (
        Do(lambda m, x: F.linear(x, m.w, x[0, :8]), w=nn.Parameter(torch.ones(8, 16))), 16, STATIC.activation,
        STATIC.weight, "the bias is computed, not stored",
    ),
    "weight per tensor": (linear(), 16, STATIC.activation, QuantizationSpec(torch.int8, PerTensor()), PER_CHANNEL),
    "weight in uint8": (
        linear(), 16, STATIC.activation, QuantizationSpec(torch.uint8, PerChannel(0), symmetric=False),
        "the kernel takes symmetric int8 weights",
    ),
    "16-bit activation": (
        linear(), 16, QuantizationSpec(torch.int16, PerTensor()), INT8_WEIGHT,
        "the kernel reads 8-bit codes, not torch.int16",
    ),
    "affine tokens": (
        linear(), 16, QuantizationSpec(torch.int8, PerToken(), symmetric=False, dynamic=True), INT8_WEIGHT,
        "per-token activations are symmetric in the int8 kernel",
    ),
    "nothing asked": (linear(), 16, STATIC.activation, None, "the configuration quantizes none of its operands"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    model, features, activation, weight, expected = NEAR_MISSES[name]
    config = Config(activation=activation, weight=weight)
    assert expected in reason(model, torch.randn(16, features), config=config).split("; ")


def test_a_constant_input_is_declined() -> None:
    constants = {"c": nn.Parameter(torch.ones(2, 16)), "w": nn.Parameter(torch.ones(8, 16))}
    model = Do(lambda m, x: x + F.linear(m.c, m.w), **constants)
    assert reason(model, torch.randn(2, 8)) == "the input is itself a constant"
