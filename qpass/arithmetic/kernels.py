"""Quantize and dequantize, each operator as plain ATen: traceable with symbolic shapes, the same codes in every mode.

Where torch's eager operators of the same names are sound the codes here are equal to theirs. They differ, for the
better, in these cases:

- the number of scales and of zero points must fit: torch broadcasts a wrong number, and takes flat per-token scales
  for columns when the input is square.
- a zero point of a narrow dtype does not wrap in dequantize.
- an int32 target saturates, and its zero point is added exactly.
- 8-bit floats are a scaled cast; torch rounds to integers first.
- float64 and float16 inputs are taken everywhere and by the same rule; half precision is computed in float32.
- groups are taken along the last dimension of any shape, a group of one included; nothing is synchronised to look for
  NaN; results are laid out like the input.
- NaN and infinities follow the rule of `qpass.arithmetic.numerics`.
- dtype, bounds and sizes are checked alike by every operator, on meta tensors as on real ones.

A dequantized value has a straight-through gradient (`qpass.arithmetic.straight_through`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic import numerics, straight_through
from qpass.arithmetic.grid import Grid, check_codes, per_channel, per_group, per_tensor, per_token
from qpass.errors import InputError

Number = Tensor | float
Integer = Tensor | int


def quantize_per_tensor(
    input: Tensor, scale: Number, zero_point: Integer, quant_min: Integer, quant_max: Integer, dtype: torch.dtype
) -> Tensor:
    """``clamp(round(input / scale) + zero_point)``; scale and zero point are numbers or tensors of one element."""
    return _quantize(input, per_tensor(scale, zero_point), quant_min, quant_max, dtype)


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
    """``(input - zero_point) * scale``, float32 or `out_dtype`."""
    grid = per_tensor(scale, zero_point)
    return _dequantize(input, grid, quant_min, quant_max, dtype, out_dtype, None)


def quantize_per_channel(
    input: Tensor, scales: Tensor, zero_points: Tensor, axis: int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """`quantize_per_tensor` with a scale for each index of `axis`: scales ``[input.shape[axis]]``."""
    return _quantize(input, per_channel(input, scales, zero_points, axis), quant_min, quant_max, dtype)


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
    grid = per_channel(input, scales, zero_points, axis)
    return _dequantize(input, grid, quant_min, quant_max, dtype, out_dtype, _by_scale(scales))


def quantize_per_token(
    input: Tensor, scales: Tensor, zero_points: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """``clamp(round(input / scale + zero_point))`` with a scale for each row: ``[..., 1]``, or flat."""
    return _quantize(input, per_token(input, scales, zero_points), quant_min, quant_max, dtype)


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
    grid = per_token(input, scales, zero_points)
    return _dequantize(input, grid, quant_min, quant_max, dtype, output_dtype, _by_scale(scales))


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
    return _quantize(input, per_group(input, scales, zero_points, group_size), quant_min, quant_max, dtype)


def dequantize_per_channel_group(
    input: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    group_size: int = 128,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`dequantize_per_token` with a scale for each `group_size` neighbours; no zero points means zeros."""
    grid = per_group(input, scales, zero_points, group_size)
    return _dequantize(input, grid, quant_min, quant_max, dtype, output_dtype, _by_scale(scales))


def fake_quant_per_channel(
    input: Tensor, scales: Tensor, zero_points: Tensor, axis: int, quant_min: int, quant_max: int
) -> Tensor:
    """``dequantize(quantize(input))`` with a scale for each index of `axis`; dtype and layout of `input`.

    The codes are those of the narrowest integer dtype that holds ``quant_min..quant_max``.
    """
    dtype = next((t for t, (low, high) in numerics.RANGES.items() if low <= quant_min and quant_max <= high), None)
    if dtype is None:
        raise InputError(f"No integer dtype holds codes of {quant_min}..{quant_max}")
    grid = per_channel(input, scales, zero_points, axis)
    codes = _quantize(input, grid, quant_min, quant_max, dtype)
    return _dequantize(codes, grid, quant_min, quant_max, dtype, input.dtype, None)


def convert_element_type(input: Tensor, dtype: torch.dtype) -> Tensor:
    """``input.to(dtype)``, always a new tensor."""
    return input.to(dtype, copy=True)


def _quantize(input: Tensor, grid: Grid, quant_min: Any, quant_max: Any, dtype: torch.dtype) -> Tensor:
    check_codes(dtype, quant_min, quant_max)
    if not input.is_floating_point():
        raise InputError(f"Values to quantize are floating point, not {input.dtype}")
    bounds = _scalar(quant_min), _scalar(quant_max)
    codes = numerics.quantize(grid.view(input), grid.scale, grid.zero_point, *bounds, dtype, grid.adds_first)
    codes = grid.back(codes)
    straight_through.remember(codes, input, grid, *bounds)
    return codes


def _dequantize(
    codes: Tensor,
    grid: Grid,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,
    out_dtype: torch.dtype | None,
    compute: torch.dtype | None,
) -> Tensor:
    """Computed in `compute`, or where that is None in what `out_dtype` asks for."""
    if codes.dtype != dtype:
        raise InputError(f"Codes are {codes.dtype}, but the operator says {dtype}")
    check_codes(dtype, quant_min, quant_max)
    values = numerics.dequantize(grid.view(codes), grid.scale, grid.zero_point, out_dtype or torch.float32, compute)
    return straight_through.connect(grid.back(values), codes, grid)


def _by_scale(scales: Tensor) -> torch.dtype:
    """The scales decide the dtype of the product, which is rounded to the output's dtype afterwards, as torch does."""
    return torch.float64 if scales.dtype == torch.float64 else torch.float32


def _scalar(bound: Any) -> Any:
    return bound.reshape(()) if isinstance(bound, Tensor) else bound
