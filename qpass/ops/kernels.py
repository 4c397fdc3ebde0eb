"""quantized_decomposed, each operator as plain ATen: traceable with symbolic shapes, the same codes eager and compiled.

Where torch's eager kernel is sound the codes here are equal to its codes. They differ, for the better, in these cases:

- the number of scales must fit: torch broadcasts a wrong number, and takes flat per-token scales for columns when the
  input is square.
- a zero point of a narrow dtype does not wrap in dequantize.
- an int32 target saturates, and its zero point is added exactly.
- float64 inputs are taken everywhere.
- the per-token and choose_qparams operators compute float16 and bfloat16 inputs in float32; torch's compute in the
  input's dtype, so that a bfloat16 row has a scale of 8 bits. Cast to float32 in the graph where eager and compiled
  must agree on such inputs.
- per-token operators honour `dtype`. (Torch's floor of 1e-5 under the row maximum is kept, so that codes agree.)
- groups are taken along the last dimension of any shape, a group of one included; nothing is synchronised to look for
  NaN.
- NaN and infinite inputs give finite qparams; the code of NaN is the lowest of the range.

`fake_quant_per_channel` and `convert_element_type.no_fuse` are not here: the first is for training, Inductor has the
second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qpass import numerics
from qpass.errors import InputError
from qpass.numerics import RANGES

Number = Tensor | float
Integer = Tensor | int


def quantize_per_tensor(
    input: Tensor, scale: Number, zero_point: Integer, quant_min: Integer, quant_max: Integer, dtype: torch.dtype
) -> Tensor:
    """``clamp(round(input / scale) + zero_point)``; scale and zero point are numbers or tensors of one element."""
    _check_storage(dtype, quant_min, quant_max)
    bounds = _scalar(quant_min), _scalar(quant_max)
    return numerics.quantize(input, _scalar(scale), _scalar(zero_point), *bounds, dtype)


def dequantize_per_tensor(
    input: Tensor,
    scale: Number,
    zero_point: Integer,
    quant_min: Integer,
    quant_max: Integer,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``(input - zero_point) * scale``."""
    _check_codes(input, dtype)
    return numerics.dequantize(input, _scalar(scale), _scalar(zero_point), out_dtype or torch.float32)


def quantize_per_channel(
    input: Tensor, scales: Tensor, zero_points: Tensor, axis: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """`quantize_per_tensor` with a scale for each index of `axis`: scales ``[input.shape[axis]]``."""
    _check_storage(dtype, quant_min, quant_max)
    shape = _channel_shape(input, scales, axis)
    return numerics.quantize(input, scales.reshape(shape), zero_points.reshape(shape), quant_min, quant_max, dtype)


def dequantize_per_channel(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    axis: int,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """`dequantize_per_tensor` with a scale for each index of `axis`; no zero points means zeros."""
    _check_codes(input, dtype)
    return _dequantize(input, scales, zero_points, _channel_shape(input, scales, axis), out_dtype)


def choose_qparams(
    input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Affine qparams of the whole tensor: scale float64 ``[1]`` (a float32 value), zero_point int64 ``[1]``."""
    return _choose_qparams(input, quant_min, quant_max, eps, dtype, symmetric=False)


def choose_qparams_symmetric(
    input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Symmetric qparams of the whole tensor: scale float64 ``[1]`` (a float32 value), zero_point int64 ``[1]``."""
    return _choose_qparams(input, quant_min, quant_max, eps, dtype, symmetric=True)


def choose_qparams_per_token(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric qparams of each row, float32 ``[..., 1]``: ``max(max|row|, 1e-5) / quant_max``, and 0 (uint8: 128)."""
    _check_storage(dtype)
    low, high = RANGES[dtype]
    middle = (low + high + 1) // 2
    largest = input.abs().amax(dim=-1, keepdim=True).to(torch.float32)
    scales = _finite(largest).clamp(min=1e-5) / float(high - middle)
    return scales, torch.full_like(scales, middle)


def choose_qparams_per_token_asymmetric(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Affine qparams of each row by XNNPACK's rule: scale float64 (a float32 value), zero_point int64, ``[..., 1]``.

    Of the two zero points that make the minimum, or the maximum, exact, the rule takes the one that errs less at the
    other end.
    """
    _check_storage(dtype)
    quant_min, quant_max = RANGES[dtype]
    low = -_finite(-input.amin(dim=-1, keepdim=True).to(torch.float32).clamp(max=0.0))
    high = _finite(input.amax(dim=-1, keepdim=True).to(torch.float32).clamp(min=0.0))
    scale = (_finite(high - low) / float(quant_max - quant_min)).clamp(min=numerics.EPS)
    from_low, from_high = low / scale, high / scale
    low_errs_less = (quant_min + from_low) + (quant_max + from_high) > 0
    zero_point = torch.where(low_errs_less, quant_min - from_low, quant_max - from_high)
    zero_point = zero_point.clamp(quant_min, quant_max).round()
    return scale.to(torch.float64), zero_point.to(torch.int64)


def quantize_per_token(
    input: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """``clamp(round(input / scale + zero_point))`` with a scale for each row: ``[..., 1]``, or flat."""
    _check_storage(dtype, quant_min, quant_max)
    shape = _token_shape(input, scales)
    return _round_after_adding(input, scales.reshape(shape), zero_points.reshape(shape), quant_min, quant_max, dtype)


def dequantize_per_token(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``(input - zero_point) * scale`` with a scale for each row."""
    return _dequantize(input, scales, zero_points, _token_shape(input, scales), output_dtype)


def quantize_per_channel_group(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int = 128,
) -> Tensor:
    """`quantize_per_token` with a scale for each `group_size` neighbours: scales ``[..., K / group_size]``."""
    _check_storage(dtype, quant_min, quant_max)
    grouped = _grouped(input, scales, group_size)
    shape = (*grouped.shape[:-1], 1)
    codes = _round_after_adding(grouped, scales.reshape(shape), zero_points.reshape(shape), quant_min, quant_max, dtype)
    return codes.reshape(input.shape)


def dequantize_per_channel_group(
    w_int8: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int = 128,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantize_per_token` with a scale for each `group_size` neighbours; no zero points means zeros."""
    grouped = _grouped(w_int8, scales, group_size)
    shape = (*grouped.shape[:-1], 1)
    return _dequantize(grouped, scales, zero_points, shape, output_dtype).reshape(w_int8.shape)


def _choose_qparams(
    input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype, symmetric: bool
) -> tuple[Tensor, Tensor]:
    _check_storage(dtype, quant_min, quant_max)
    low, high = torch.aminmax(input)
    scale, zero_point = numerics.choose_qparams(low, high, quant_min, quant_max, symmetric, eps)
    return scale.reshape(1).to(torch.float64), zero_point.reshape(1).to(torch.int64)


def _round_after_adding(
    input: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """The per-token and per-group operators add the zero point before they round: some ties fall differently."""
    compute = numerics.compute_dtype(input.dtype, scales)
    values = input.to(compute) * (1.0 / scales.to(compute)) + zero_points.to(compute)
    if numerics.is_wide(dtype):
        values = values.to(torch.float64)
    return numerics.saturate(values.round(), quant_min, quant_max, dtype)


def _dequantize(
    codes: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    shape: Sequence[int],
    out_dtype: torch.dtype | None,
) -> Tensor:
    """The scales decide the dtype of the product, which is rounded to `out_dtype` afterwards."""
    zero_point: Integer = 0 if zero_points is None else zero_points.reshape(shape)
    compute = numerics.compute_dtype(torch.float32, scales)
    return numerics.dequantize(codes, scales.reshape(shape), zero_point, compute).to(out_dtype or torch.float32)


def _finite(size: Tensor) -> Tensor:
    """The largest float32 in place of NaN and of infinity: the row is lost, but its scale is a number."""
    largest = torch.finfo(torch.float32).max
    return torch.where(size <= largest, size, largest)


def _scalar(value: Any) -> Any:
    """A tensor of one element as a scalar tensor, which like a number does not widen what it is combined with."""
    return value.reshape(()) if isinstance(value, Tensor) else value


def _channel_shape(input: Tensor, scales: Tensor, axis: int) -> list[int]:
    if not -input.dim() <= axis < input.dim():
        raise InputError(f"axis {axis} is out of range for a tensor of {input.dim()} dimensions.")
    axis %= input.dim()
    torch._check_value(
        scales.numel() == input.shape[axis],
        lambda: f"{scales.numel()} scales for the {input.shape[axis]} indices of dimension {axis}.",
    )
    return [input.shape[axis] if dim == axis else 1 for dim in range(input.dim())]


def _token_shape(input: Tensor, scales: Tensor) -> tuple[int, ...]:
    rows = math.prod(input.shape[:-1])  # torch.Size.numel() would turn symbolic sizes into numbers
    torch._check_value(scales.numel() == rows, lambda: f"{scales.numel()} scales for {rows} rows.")
    return *input.shape[:-1], 1


def _grouped(input: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """``[..., K] -> [..., K / group_size, group_size]``; a group wider than the row it has to itself is the row."""
    columns = input.shape[-1]
    if group_size > columns and scales.shape[-1] == 1:
        group_size = columns
    if group_size < 1 or columns % group_size != 0:
        raise InputError(f"group_size {group_size} does not divide the {columns} columns of the tensor.")
    groups = input.numel() // group_size
    torch._check_value(scales.numel() == groups, lambda: f"{scales.numel()} scales for {groups} groups.")
    return input.reshape(*input.shape[:-1], columns // group_size, group_size)


def _check_storage(dtype: torch.dtype, quant_min: Integer | None = None, quant_max: Integer | None = None) -> None:
    if dtype not in RANGES:
        raise InputError(f"Codes cannot be stored as {dtype}.", hint=f"use one of {', '.join(map(str, RANGES))}")
    low, high = RANGES[dtype]
    for bound in (quant_min, quant_max):
        if isinstance(bound, int) and not low <= bound <= high:
            raise InputError(f"A code of {bound} does not fit {dtype}, which holds {low}..{high}.")


def _check_codes(codes: Tensor, dtype: torch.dtype) -> None:
    if codes.dtype != dtype:
        raise InputError(f"Codes are {codes.dtype}, but the operator says {dtype}.")
