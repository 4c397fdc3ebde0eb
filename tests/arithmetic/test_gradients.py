"""Straight-through gradients against autograd of the same formula, in which rounding is written as the identity."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from qpass.arithmetic import straight_through
from qpass.arithmetic.numerics import FLOAT8_RANGES
from qpass.ops import quantized_decomposed as ops

LOW, HIGH = -8, 7


def reference(x: Tensor, scale: Tensor, zero_point: Any, adds_first: bool = False) -> Tensor:
    """``dequantize(quantize(x))`` in float64, differentiable: ``round(t) = t + (round(t) - t).detach()``."""
    unrounded = x / scale + (zero_point if adds_first else 0)
    rounded = unrounded + (unrounded.round() - unrounded).detach()
    code = rounded + (0 if adds_first else zero_point)
    code = torch.where(
        code < LOW, LOW, torch.where(code > HIGH, HIGH, code)
    )  # of clamp, torch 2.15 stops it at the ends
    return (code - zero_point) * scale


def per_channel(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
    codes = ops.quantize_per_channel(x, s, z, -1, LOW, HIGH, torch.int8)
    return ops.dequantize_per_channel(codes, s, z, 1, LOW, HIGH, torch.int8)


def per_token(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
    codes = ops.quantize_per_token(x.t(), s, z, LOW, HIGH, torch.int8)
    return ops.dequantize_per_token(codes, s, z, LOW, HIGH, torch.int8, torch.float32).t()


def per_group(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
    flat = x.t().reshape(1, -1)
    codes = ops.quantize_per_channel_group(flat, s[None], z[None], LOW, HIGH, torch.int8, len(x))
    values = ops.dequantize_per_channel_group(codes, s[None], z[None], LOW, HIGH, torch.int8, len(x), torch.float32)
    return values.reshape(-1, len(x)).t()


def fake(x: Tensor, s: Tensor, z: Tensor) -> Tensor:
    return ops.fake_quant_per_channel(x, s, z, 1, LOW, HIGH)


@pytest.mark.parametrize("function", [per_channel, fake, per_token, per_group])
def test_gradients_are_the_formulas(function: Any) -> None:
    """To input, scales and zero points, inside and outside the range; each column has its own scale."""
    leaves = [torch.randn(50, 12) * 4, torch.rand(12) + 0.25, torch.randint(-2, 3, (12,)).float()]
    grad = torch.randn(50, 12)
    found = [t.clone().requires_grad_() for t in leaves]
    exact = [t.double().requires_grad_() for t in leaves]
    values = function(*found)
    expected = reference(*exact, adds_first=function in (per_token, per_group))
    code = (leaves[0] / leaves[1]).round() + leaves[2]
    clamped = (code < LOW) | (code > HIGH)
    assert 0.05 < clamped.double().mean() < 0.5
    torch.testing.assert_close(values.double(), expected, rtol=1e-6, atol=0)  # one float32 product
    values.backward(grad)
    expected.backward(grad.double())
    assert torch.equal(found[0].grad, torch.where(clamped, 0, grad))  # exact, whatever the scale
    for f, e in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(f.grad.double(), e.grad, rtol=1e-4, atol=1e-4)  # float32 sums of 50 terms


def test_the_gradient_of_scalar_qparams_and_of_float8() -> None:
    x = torch.tensor([[0.3, 500.0], [torch.nan, -torch.inf]], requires_grad=True)
    for dtype, (low, high) in {torch.uint8: (0, 255), torch.int32: (-9, 9), **FLOAT8_RANGES}.items():
        codes = ops.quantize_per_tensor(x, 0.001, 0, low, high, dtype)
        assert not codes.requires_grad
        values = ops.dequantize_per_tensor(codes, 0.001, 0, low, high, dtype, out_dtype=torch.bfloat16)
        (grad,) = torch.autograd.grad(values.sum(), x)
        inside = high >= 0.3 / 0.001
        assert grad.tolist() == [[float(inside), 0.0], [0.0, 0.0]]


def test_other_qparams_keep_the_chain_rule() -> None:
    x = torch.tensor([[1.0, 9.0], [2.0, -9.0]], requires_grad=True)
    s, z, tail = torch.tensor([1.0, 0.5], requires_grad=True), torch.zeros(2), (LOW, HIGH, torch.int8)
    codes = ops.quantize_per_channel(x, s, z, 0, *tail)
    ops.dequantize_per_tensor(codes, 3.0, 0, *tail).sum().backward()
    assert x.grad.tolist() == [[3.0, 0.0], [6.0, 0.0]]
    assert s.grad.tolist() == [-3.0, -24.0]  # -3 x / s^2 of what was not clamped


def test_another_tensor_ends_the_connection() -> None:
    x, s, z = torch.ones(2, 2, requires_grad=True), torch.ones(2), torch.zeros(2)
    codes = ops.quantize_per_channel(x, s, z, 0, LOW, HIGH, torch.int8)
    tail = (0, LOW, HIGH, torch.int8)
    assert ops.dequantize_per_channel(codes, s, z, *tail).requires_grad
    assert not ops.dequantize_per_channel(codes.clone(), s, z, *tail).requires_grad
    with torch.no_grad():
        assert not ops.dequantize_per_channel(codes, s, z, *tail).requires_grad


def test_a_scale_alone_has_the_gradient_of_dequantize() -> None:
    codes = torch.tensor([[3, -4]], dtype=torch.int8)
    scales = torch.tensor([0.5], requires_grad=True)
    ops.dequantize_per_channel(codes, scales, torch.tensor([1]), 0, -8, 7, torch.int8).sum().backward()
    assert scales.grad.tolist() == [2.0 - 5.0]


def test_nothing_is_remembered_of_codes_that_are_gone() -> None:
    x = torch.ones(2, requires_grad=True)
    gc.collect()
    before = len(straight_through._sources)
    codes = ops.quantize_per_tensor(x, 1.0, 0, LOW, HIGH, torch.int8)
    assert len(straight_through._sources) == before + 1
    del codes
    assert len(straight_through._sources) == before
    with torch.no_grad():
        codes = ops.quantize_per_tensor(x, 1.0, 0, LOW, HIGH, torch.int8)
    assert len(straight_through._sources) == before
    assert codes.tolist() == [1, 1]


def test_converting_has_the_gradient_of_a_cast() -> None:
    x = torch.randn(4, requires_grad=True)
    y = ops.convert_element_type.no_fuse(x, torch.bfloat16)
    assert torch.equal(y, x.to(torch.bfloat16))
    y.backward(torch.arange(4).bfloat16())
    assert x.grad.tolist() == [0.0, 1.0, 2.0, 3.0]
    same = ops.convert_element_type.no_fuse(x, torch.float32)
    assert same.data_ptr() != x.data_ptr()


def test_half_precision_gradients_keep_their_dtype() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        x = torch.randn(3, 4).to(dtype).requires_grad_()
        s = torch.rand(3).add(0.1).to(dtype).requires_grad_()
        y = ops.fake_quant_per_channel(x, s, torch.zeros(3), 0, -8, 7)
        assert y.dtype == dtype
        y.sum().backward()
        assert (x.grad.dtype, s.grad.dtype) == (dtype, dtype)
