"""min, max -> scale, zero_point;  x -> codes -> x: the arithmetic of quantization, written once.

With ``s`` the scale, ``z`` the zero point and ``inv = 1 / s``, all in float32:

    code  = clamp(round(x * inv) + z, quant_min, quant_max)     ties go to the even integer
    value = (code - z) * s

This is the arithmetic of ``quantized_decomposed.quantize_per_tensor`` and ``quantize_per_channel``, so the codes are
the same. Theirs takes ``inv`` as the double ``1.0 / scale`` rounded to float32 where the scale is a number, and as a
float32 division where it is a float32 tensor; for a scale that is a float32 value both give the same ``inv``, because
a quotient of two 24-bit numbers that is rounded to 53 bits first and to 24 bits then is rounded correctly (Figueroa
1995: 53 >= 2 * 24 + 2). The operators for tokens and groups round the sum instead: ``round(x * inv + z)``.

float16 and bfloat16 are computed in float32; a float64 tensor or scale is computed in float64. Codes of more than 16
bits are added and clamped in float64, where they are exact.

8-bit floats are codes, too. They are not rounded to integers: ``code = clamp(x * inv + z, quant_min, quant_max)``, cast
to the dtype, which rounds to its nearest value, ties to even. So a value beyond the range saturates at its end; the
cast by itself would make it NaN or infinite.

**NaN and infinities**, in every operator, eager and compiled:

- an infinity saturates: it takes the code at its end of the range;
- NaN takes the lowest code, quant_min; in 8-bit floats, which have a code for it, it stays NaN;
- where a scale is chosen, an end of the range that is NaN counts as 0 and an infinite one as the largest float32, so
  scale and zero point are always finite. Whatever shares its scale with a NaN or an infinity loses its precision.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic import tiling

RANGES: dict[torch.dtype, tuple[int, int]] = {
    dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32)
}
"""Storage dtypes of integer codes, with the smallest and the largest code each can hold."""

FLOAT8_RANGES: dict[torch.dtype, tuple[int, int]] = {
    dtype: (int(torch.finfo(dtype).min), int(torch.finfo(dtype).max))
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)
}
"""The 8-bit floats that can be codes, with the smallest and the largest finite value of each."""

CODE_RANGES = {**RANGES, **FLOAT8_RANGES}
"""Every dtype that codes can be stored in."""

EPS = torch.finfo(torch.float32).eps
"""The smallest scale, where nobody asks for another."""


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``: how messages, reports and records name a dtype."""
    return str(dtype).removeprefix("torch.")


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
    low = finite(min_val).clamp(max=0.0)
    high = finite(max_val).clamp(min=0.0)
    if symmetric:
        scale = torch.maximum(-low, high) / ((quant_max - quant_min) / 2)
        scale = scale.clamp(min=eps)
        zero_point = torch.full_like(scale, (quant_min + quant_max + 1) // 2, dtype=torch.int32)
        return scale, zero_point
    scale = (high - low).clamp(max=largest) / float(quant_max - quant_min)
    scale = scale.clamp(min=eps)
    code_of_zero = quant_min - torch.round(low / scale).to(torch.int64)
    return scale, code_of_zero.clamp(quant_min, quant_max).to(torch.int32)


def finite(values: Tensor) -> Tensor:
    """As float32, with NaN as 0 and infinities as the largest float."""
    return torch.nan_to_num(values.to(torch.float32), nan=0.0)


def quantize(
    x: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    quant_min: Any,
    quant_max: Any,
    dtype: torch.dtype,
    adds_first: bool = False,
) -> Tensor:
    """``clamp(round(x / scale) + zero_point, quant_min, quant_max)``, by the arithmetic at the top of this file.

    Nothing is differentiated: codes have no gradient. Plain CPU tensors are worked on a block at a time.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        scale, zero_point: numbers, or tensors that broadcast with `x`.
        quant_min, quant_max: integers, or integer tensors of one element.
        adds_first: round the sum with the zero point instead, as the operators for tokens and groups do.

    Returns:
        codes of the broadcast shape (that of `x`), laid out like `x`.
    """
    x, scale, zero_point = detached(x), detached(scale), detached(zero_point)
    if isinstance(quant_min, int) and isinstance(quant_max, int) and tiling.can_fill(x, (scale, zero_point)):
        codes = torch.empty_like(x, dtype=dtype)
        return _quantize_into(codes, x, scale, zero_point, quant_min, quant_max, adds_first)
    return saturate(unclamped(x, scale, zero_point, dtype, adds_first), quant_min, quant_max, dtype)


def unclamped(
    x: Tensor, scale: Tensor | float, zero_point: Tensor | int, dtype: torch.dtype, adds_first: bool = False
) -> Tensor:
    """The codes of `dtype` in floating point, before they are clamped: of any size, and NaN where `x` is NaN."""
    compute = compute_dtype(x.dtype, scale)
    values = x.to(compute) * _inverse(scale, compute)
    wide = torch.float64 if is_wide(dtype) else compute
    if dtype in FLOAT8_RANGES:
        return values - (0 - _as(zero_point, compute))  # -0.0 + 0 would be 0.0
    if adds_first:
        return torch.round(values.to(wide) + _as(zero_point, wide))
    values = torch.round(values)  # rebound, so that no third temporary is alive
    return values.to(wide) + _as(zero_point, wide)


def saturate(values: Tensor, quant_min: Any, quant_max: Any, dtype: torch.dtype) -> Tensor:
    """Codes in floating point -> codes: clamped to the range, NaN by the rule at the top of this file.

    Written as comparisons: ``clamp`` would keep NaN, for which the conversion to integers has no answer, and it costs
    more instructions in Inductor's C++.
    """
    if dtype in FLOAT8_RANGES:
        values = torch.where(values < quant_min, quant_min, values)
        return torch.where(values > quant_max, quant_max, values).to(dtype)
    values = torch.where(values > quant_min, values, quant_min)
    return torch.where(values < quant_max, values, quant_max).to(dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor | float,
    zero_point: Tensor | int,
    out_dtype: torch.dtype = torch.float32,
    compute: torch.dtype | None = None,
) -> Tensor:
    """``(codes - zero_point) * scale`` as `out_dtype`.

    The difference is taken where it is exact (float32 up to 16 bits, int64 above), so a zero point of a narrow dtype
    never wraps.

    Args:
        codes: any dtype of `RANGES` or `FLOAT8_RANGES`, any shape.
        scale, zero_point: numbers, or tensors that broadcast with `codes`.
        compute: the dtype to compute in. None: float32, or float64 where `out_dtype` or the scale is.
    """
    compute = compute or compute_dtype(out_dtype, scale)
    if is_wide(codes.dtype):
        distance = (codes.to(torch.int64) - _as(zero_point, torch.int64)).to(compute)
        return (distance * _as(scale, compute)).to(out_dtype)
    operands = _as(zero_point, compute), _as(scale, compute)
    if tiling.can_fill(codes, operands):
        return tiling.fill(torch.empty_like(codes, dtype=out_dtype), codes, operands, _dequantizer(compute))
    return ((codes.to(compute) - operands[0]) * operands[1]).to(out_dtype)


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
    """`quantize` in blocks: a weight of any size costs its codes and 4 MiB of temporaries, no more.

    Args:
        w: the weight, any floating dtype and layout. For groups of ``g`` pass ``w.reshape(-1, g)``, flat qparams and
            axis 0.
        scale, zero_point: one element for each index of `axis`; one element in all where `axis` is None.
        out: where to write the codes: shape of `w`, dtype `dtype`. None: a new tensor.

    Returns:
        `out`, or a new contiguous tensor of codes.
    """
    codes = torch.empty(w.shape, dtype=dtype, device=w.device) if out is None else out
    shape = [1] * w.dim()
    if axis is not None:
        shape[axis] = w.shape[axis]
    qparams = scale.detach().reshape(shape), zero_point.reshape(shape)
    return _quantize_into(codes, w.detach(), *qparams, quant_min, quant_max, adds_first=False)


def detached(value: Any) -> Any:
    """`value` without its gradient; the very tensor where it has none, so that no graph gets a node for it."""
    return value.detach() if isinstance(value, Tensor) and value.requires_grad else value


def compute_dtype(dtype: torch.dtype, scale: Tensor | float = 1.0) -> torch.dtype:
    """The dtype to compute in: float64 where `dtype` or a non-scalar `scale` is float64, else float32."""
    if dtype == torch.float64 or (isinstance(scale, Tensor) and scale.dim() > 0 and scale.dtype == torch.float64):
        return torch.float64
    return torch.float32


def is_wide(dtype: torch.dtype) -> bool:
    """Whether codes of `dtype` and their distance from a zero point can be too large to be exact in float32."""
    return dtype in RANGES and RANGES[dtype][1] >= 1 << 16


def _quantize_into(
    codes: Tensor, x: Tensor, scale: Any, zero_point: Any, quant_min: int, quant_max: int, adds_first: bool
) -> Tensor:
    """`unclamped` and `saturate` in place, block by block."""
    compute = compute_dtype(x.dtype, scale)
    wide = torch.float64 if is_wide(codes.dtype) else compute
    rounds = codes.dtype in RANGES

    def work(block: Tensor, inverse: Any, zero_point: Any) -> Tensor:
        values = block.to(compute) * inverse
        if not rounds:
            return values.sub_(0 - zero_point).clamp_(quant_min, quant_max)
        if not adds_first:
            values.round_()
        values = values.to(wide).add_(zero_point)
        if adds_first:
            values.round_()
        return values.nan_to_num_(nan=quant_min).clamp_(quant_min, quant_max)

    return tiling.fill(codes, x, (_inverse(scale, compute), _as(zero_point, wide)), work)


def _dequantizer(compute: torch.dtype) -> Any:
    return lambda block, zero_point, scale: block.to(compute).sub_(zero_point).mul_(scale)


def _inverse(scale: Tensor | float, compute: torch.dtype) -> Tensor | float:
    if not isinstance(scale, Tensor):
        return 1.0 / scale
    wide = torch.promote_types(scale.dtype, torch.float32)
    return (1.0 / scale.to(wide)).to(compute)


def _as(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) else value
