"""min, max -> scale, zero_point;  x -> codes -> x: the arithmetic of quantization, written once.

With ``s`` the scale, ``z`` the zero point and ``inv = 1 / s``, all in float32:

    code  = clamp(round(x * inv) + z, quant_min, quant_max)     ties go to the even integer
    value = (code - z) * s

This is the arithmetic of ``quantized_decomposed.quantize_per_tensor`` and ``quantize_per_channel``, so the codes are
the same. Theirs takes ``inv`` as the double ``1.0 / scale`` rounded to float32 where the scale is a number, and as a
float32 division where it is a float32 tensor; for a scale that is a float32 value both give the same ``inv``, because
a quotient of two 24-bit numbers that is rounded to 53 bits first and to 24 bits then is rounded correctly (Figueroa
1995: 53 >= 2 * 24 + 2).

float16 and bfloat16 are computed in float32; a float64 tensor or scale is computed in float64. Codes of more than 16
bits are added and clamped in float64, where they are exact. Infinities saturate. NaN has no code of its own and takes
the lowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

RANGES: dict[torch.dtype, tuple[int, int]] = {
    dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)
}
"""Storage dtypes of codes, with the smallest and the largest code each can hold."""

EPS = torch.finfo(torch.float32).eps
"""The smallest scale, where nobody asks for another."""

BLOCK = 1 << 18
"""Elements that `quantize_weight` works on at once: 1 MiB of float32, so that its temporaries stay in cache."""


def choose_qparams(
    min_val: Tensor, max_val: Tensor, quant_min: int, quant_max: int, symmetric: bool, eps: float = EPS
) -> tuple[Tensor, Tensor]:
    """The scale and zero point that spread ``quant_min..quant_max`` over ``min_val..max_val``, widened to hold zero.

    symmetric: ``scale = max(|min|, |max|) / ((quant_max - quant_min) / 2)``; the zero point is the middle of the
    codes, rounded up: 0 for -127..127 and -128..127, 128 for 0..255. Affine: ``scale = (max - min) / (quant_max -
    quant_min)``, and the zero point is the code of 0. Every value of the range then lies within half a scale of its
    decoded code (affine: rounding the zero point can shift that by another half). The formulas and their order of
    rounding are torch.ao's ``determine_qparams``.

    Args:
        min_val, max_val: ends of the observed range, any floating dtype, one shape. NaN counts as 0, infinities as
            the largest float.
        eps: the smallest scale.

    Returns:
        scale (float32, positive, finite) and zero_point (int32, within the codes), shaped like `min_val`.
    """
    largest = torch.finfo(torch.float32).max
    low = _finite(min_val.to(torch.float32)).clamp(max=0.0)
    high = _finite(max_val.to(torch.float32)).clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-low, high) / ((quant_max - quant_min) / 2)
        scale = scale.clamp(min=eps)
        zero_point = torch.full_like(scale, (quant_min + quant_max + 1) // 2, dtype=torch.int32)
        return scale, zero_point
    scale = (high - low).clamp(max=largest) / float(quant_max - quant_min)
    scale = scale.clamp(min=eps)
    code_of_zero = quant_min - torch.round(low / scale).to(torch.int64)
    return scale, code_of_zero.clamp(quant_min, quant_max).to(torch.int32)


def quantize(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, quant_min: int, quant_max: int, dtype: torch.dtype
) -> Tensor:
    """``clamp(round(x / scale) + zero_point, quant_min, quant_max)``, by the arithmetic at the top of this file.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        scale, zero_point: numbers, or tensors that broadcast with `x`.

    Returns:
        codes of the broadcast shape (that of `x`).
    """
    compute = compute_dtype(x.dtype, scale)
    values = torch.round(x.to(compute) * _inverse(scale, compute))
    if is_wide(dtype):
        values = values.to(torch.float64)
    values = values + _as(zero_point, values.dtype)  # named: under Dynamo a call keeps all that stood in it alive
    return saturate(values, quant_min, quant_max, dtype)


def saturate(values: Tensor, quant_min: int, quant_max: int, dtype: torch.dtype) -> Tensor:
    """Whole numbers in floating point -> codes: clamped to the range, NaN to its lower end.

    Written as comparisons: ``clamp`` would keep NaN, for which the conversion to integers has no answer, and it costs
    more instructions in Inductor's C++.
    """
    values = torch.where(values > quant_min, values, quant_min)
    return torch.where(values < quant_max, values, quant_max).to(dtype)


def dequantize(
    codes: Tensor, scale: Tensor | float, zero_point: Tensor | int, out_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``(codes - zero_point) * scale`` as `out_dtype`, computed in float32 (float64 where `out_dtype` or the scale is).

    The difference is taken where it is exact (float32 up to 16 bits, int64 above), so a zero point of a narrow dtype
    never wraps.

    Args:
        codes: any dtype of `RANGES`, any shape.
        scale, zero_point: numbers, or tensors that broadcast with `codes`.
    """
    compute = compute_dtype(out_dtype, scale)
    if is_wide(codes.dtype):
        distance = (codes.to(torch.int64) - _as(zero_point, torch.int64)).to(compute)
    else:
        distance = codes.to(compute) - _as(zero_point, compute)
    return (distance * _as(scale, compute)).to(out_dtype)


def quantize_weight(
    w: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    axis: int | None,
    quant_min: int,
    quant_max: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """`quantize` in blocks of `BLOCK` elements: a weight of any size costs its codes and 4 MiB of temporaries, no more.

    Args:
        w: the weight, any floating dtype and layout. For groups of ``g`` pass ``w.reshape(-1, g)``, flat qparams and
            axis 0.
        scale, zero_point: one element for each index of `axis`; one element in all where `axis` is None.
        out: where to write the codes: shape of `w`, dtype `dtype`. None: a new tensor.

    Returns:
        `out`, or a new contiguous tensor of codes.
    """
    w = w.detach()
    codes = torch.empty(w.shape, dtype=dtype, device=w.device) if out is None else out
    shape = [1] * w.dim()
    if axis is not None:
        shape[axis] = w.shape[axis]
    scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    for block in _blocks(w.shape):
        own = tuple(part if size > 1 else slice(None) for part, size in zip(block, shape, strict=True))
        codes[block] = quantize(w[block], scale[own], zero_point[own], quant_min, quant_max, dtype)
    return codes


def compute_dtype(dtype: torch.dtype, scale: Tensor | float = 1.0) -> torch.dtype:
    """The dtype to compute in: float64 where `dtype` or a non-scalar `scale` is float64, else float32."""
    if dtype == torch.float64 or (isinstance(scale, Tensor) and scale.dim() > 0 and scale.dtype == torch.float64):
        return torch.float64
    return torch.float32


def is_wide(dtype: torch.dtype) -> bool:
    """Whether codes of `dtype` and their distance from a zero point can be too large to be exact in float32."""
    return RANGES[dtype][1] >= 1 << 16


def _inverse(scale: Tensor | float, compute: torch.dtype) -> Tensor | float:
    if not isinstance(scale, Tensor):
        return 1.0 / scale
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (1.0 / scale.to(wide)).to(compute)


def _finite(values: Tensor) -> Tensor:
    return torch.nan_to_num(values, nan=0.0)


def _as(value: Tensor | float, dtype: torch.dtype) -> Tensor | float:
    return value.to(dtype) if isinstance(value, Tensor) else value


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut a tensor of that shape into blocks of at most `BLOCK` elements."""
    if math.prod(shape) <= BLOCK:
        yield tuple(slice(None) for _ in shape)
        return
    row = math.prod(shape[1:])
    if row > BLOCK:
        for index in range(shape[0]):
            for rest in _blocks(shape[1:]):
                yield slice(index, index + 1), *rest
        return
    step = BLOCK // row
    for start in range(0, shape[0], step):
        yield slice(start, start + step), *(slice(None) for _ in shape[1:])
