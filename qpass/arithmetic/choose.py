"""x -> scale, zero_point: the operators that choose qparams, of a whole tensor or of each row.

Scales are finite and positive and zero points are codes, whatever is in the input: see the rule of NaN and infinities
in `arithmetic.numerics`. Of no elements at all the qparams are those of zeros. The choice is a constant to autograd.

float16 and bfloat16 inputs are computed in float32, where torch's per-token operators compute in the input's dtype, so
that a bfloat16 row has a scale of 8 bits. Cast to float32 in a graph that must give the same codes eager and compiled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic import numerics
from qpass.arithmetic.grid import check_codes
from qpass.arithmetic.numerics import CODE_RANGES
from qpass.errors import InputError


def choose_qparams(
    input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Affine qparams of the whole tensor: scale float64 ``[1]`` (a float32 value), zero_point int64 ``[1]``."""
    return _of_the_whole(input, quant_min, quant_max, eps, dtype, symmetric=False)


def choose_qparams_symmetric(
    input: Tensor, quant_min: int, quant_max: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Symmetric qparams of the whole tensor: scale float64 ``[1]`` (a float32 value), zero_point int64 ``[1]``."""
    return _of_the_whole(input, quant_min, quant_max, eps, dtype, symmetric=True)


def choose_qparams_per_token(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Symmetric qparams of each row, float32 ``[..., 1]``: ``max|row| / quant_max``, at least `numerics.EPS`.

    The zero points are the middle of the codes: 0, and of uint8 128.
    """
    largest, middle, levels = _token_range(input, dtype)
    scales = (largest / levels).clamp(min=numerics.EPS)
    return scales, torch.full_like(scales, middle)


def choose_qparams_per_token_floored(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`choose_qparams_per_token` as torch's operator does it, so that codes agree: ``max|row|`` is at least 1e-5."""
    largest, middle, levels = _token_range(input, dtype)
    scales = largest.clamp(min=1e-5) / levels
    return scales, torch.full_like(scales, middle)


def choose_qparams_per_token_asymmetric(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Affine qparams of each row by XNNPACK's rule: scale float64 (a float32 value), zero_point int64, ``[..., 1]``.

    Of the two zero points that make the minimum, or the maximum, exact, the rule takes the one that errs less at the
    other end.
    """
    _check(input, dtype, None, None)
    quant_min, quant_max = CODE_RANGES[dtype]
    low = numerics.finite(_ends(input, torch.amin)).clamp(max=0.0)
    high = numerics.finite(_ends(input, torch.amax)).clamp(min=0.0)
    scale = (_at_most_largest(high - low) / float(quant_max - quant_min)).clamp(min=numerics.EPS)
    from_low, from_high = low / scale, high / scale
    low_errs_less = (quant_min + from_low) + (quant_max + from_high) > 0
    zero_point = torch.where(low_errs_less, quant_min - from_low, quant_max - from_high)
    zero_point = zero_point.clamp(quant_min, quant_max).round()
    return scale.to(torch.float64), zero_point.to(torch.int64)


def _of_the_whole(
    input: Tensor, quant_min: int, quant_max: int, eps: Any, dtype: torch.dtype, symmetric: bool
) -> tuple[Tensor, Tensor]:
    _check(input, dtype, quant_min, quant_max)
    if quant_min >= quant_max:
        raise InputError(f"quant_min ({quant_min}) must be below quant_max ({quant_max})")
    if _is_none(input.numel()):
        low = high = input.new_zeros(())
    else:
        low, high = torch.aminmax(numerics.detached(input))
    scale, zero_point = numerics.choose_qparams(low, high, quant_min, quant_max, symmetric, eps)
    return scale.reshape(1).to(torch.float64), zero_point.reshape(1).to(torch.int64)


def _token_range(input: Tensor, dtype: torch.dtype) -> tuple[Tensor, int, float]:
    """The largest magnitude of each row, the middle of the codes and how many lie above it."""
    _check(input, dtype, None, None)
    low, high = CODE_RANGES[dtype]
    middle = (low + high + 1) // 2
    return numerics.finite(_ends(input.abs(), torch.amax)), middle, float(high - middle)


def _ends(input: Tensor, end: Any) -> Tensor:
    """``end(input, dim=-1, keepdim=True)``, and 0 for rows without elements."""
    input = numerics.detached(input)
    if input.dim() and _is_none(input.shape[-1]):
        return input.new_zeros((*input.shape[:-1], 1))
    found: Tensor = end(input, dim=-1, keepdim=True)
    return found


def _at_most_largest(size: Tensor) -> Tensor:
    return size.clamp(max=torch.finfo(torch.float32).max)


def _check(input: Tensor, dtype: torch.dtype, quant_min: Any, quant_max: Any) -> None:
    check_codes(dtype, quant_min, quant_max)
    if not input.is_floating_point():
        raise InputError(f"Values to quantize are floating point, not {input.dtype}")


def _is_none(number: int) -> bool:
    """Whether a count is 0; False where a symbolic one may be anything."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy

    return bool(guard_or_false(number == 0))
