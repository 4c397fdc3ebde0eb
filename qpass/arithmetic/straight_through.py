"""d code / d x: the gradient through rounding, which codes themselves cannot carry.

Autograd knows no gradient of integers, so a code tensor that was made of something differentiable is remembered
together with it, for as long as the code tensor itself lives; dequantizing that very tensor passes gradients on to
what it was made of. Anything in between that makes another tensor (a view, a cast) ends the connection, and then there
is no gradient beyond the codes, as there is none by torch's operators.

With ``code = clamp(round(x / s) + z)``, rounding counted as the identity, and "inside" meaning not clamped:

    d code / d x = 1 / s,   d code / d s = -x / s^2,   d code / d z = 1     inside; 0 outside

and NaN is outside. Together with the ordinary gradients of ``value = (code - z) * s`` that gives, for the same qparams
on both sides:

    d value / d x = 1 inside, 0 outside                                  Bengio et al. 2013, clipped
    d value / d s = (code - z) - x / s inside, code - z outside          Esser et al. 2020 (LSQ)
    d value / d z = 0 inside, -s outside                                 Bhalgat et al. 2020 (LSQ+)

Scale and zero point get a gradient where they are floating-point tensors that require one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qpass.arithmetic import numerics
from qpass.arithmetic.grid import Grid


@dataclass(frozen=True, eq=False)
class Source:
    """What a code tensor was quantized from, and how."""

    x: Tensor
    grid: Grid
    quant_min: Any
    quant_max: Any
    dtype: torch.dtype


_sources = WeakTensorKeyDictionary()


def remember(codes: Tensor, x: Tensor, grid: Grid, quant_min: Any, quant_max: Any) -> None:
    """Connect `codes` with what they were made of, if anybody may ask for a gradient."""
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, grid.scale, grid.zero_point)
    ):
        _sources[codes] = Source(x, grid, quant_min, quant_max, codes.dtype)


def connect(values: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """`values`, which are `codes` dequantized by `grid`, with a gradient to what the codes were made of."""
    source: Source | None = _sources.get(codes) if torch.is_grad_enabled() and len(_sources) else None
    if source is None or source.grid.group_size != grid.group_size:
        return values
    scale = grid.scale.detach() if isinstance(grid.scale, Tensor) else grid.scale
    made_of = source.x, source.grid.scale, source.grid.zero_point
    result: Tensor = _Connect.apply(values, *made_of, scale, source)
    return result


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, x: Tensor, scale: Any, zero_point: Any, factor: Any, source: Source
    ) -> Tensor:
        given = x, scale, zero_point, factor
        ctx.save_for_backward(*(t if isinstance(t, Tensor) else None for t in given))
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in given]
        grid = source.grid
        ctx.form = grid.view, grid.back, grid.adds_first, source.quant_min, source.quant_max, source.dtype
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.numbers, strict=True)
        x, scale, zero_point, factor = (number if tensor is None else tensor for tensor, number in saved)
        view, back, adds_first, quant_min, quant_max, dtype = ctx.form
        whole = view(x)
        unclamped = numerics.unclamped(whole, scale, zero_point, dtype, adds_first)
        inside = (unclamped >= quant_min) & (unclamped <= quant_max)
        grad = torch.where(inside, view(grads[0]), 0)
        through = grad * (factor / scale)  # by exactly 1 where both scales are one
        _, for_x, for_scale, for_zero_point, _, _ = ctx.needs_input_grad
        return (
            grads[0],
            back(through).to(x.dtype) if for_x else None,
            _reduced(-through * torch.where(inside, whole / scale, 0), scale) if for_scale else None,
            _reduced(grad * factor, zero_point) if for_zero_point else None,
            None,
            None,
        )


def _reduced(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape).to(like.dtype)
