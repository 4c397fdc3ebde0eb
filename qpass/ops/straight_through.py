"""d dequantize(quantize(x)) / dx = 1 inside the range, 0 outside: the gradient that codes themselves cannot carry.

Autograd knows no gradient of integers, so a code tensor that was made of something differentiable is remembered
together with it, for as long as the code tensor itself lives. Dequantizing that very tensor with the very same
qparams is then one differentiable step. Anything between the two that makes another tensor (a view, a cast) ends the
connection, and the values have no gradient, as they have none by torch's operators.

With ``t = x / s``, ``u = round(t) + z`` and ``code = clamp(u, quant_min, quant_max)``, rounding counted as the
identity, and "inside" meaning that ``u`` was not clamped:

    d value / d x = 1 inside, 0 outside                                  Bengio et al. 2013, clipped
    d value / d s = (code - z) - t inside, code - z outside              Esser et al. 2020 (LSQ)
    d value / d z = 0 inside, -s outside                                 Bhalgat et al. 2020 (LSQ+)

NaN is outside. Scale and zero point get a gradient where they are floating-point tensors that require one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from qpass import numerics
from qpass.ops.grid import Grid


@dataclass(frozen=True, eq=False)
class Source:
    """What a code tensor was quantized from, and how."""

    x: Tensor
    grid: Grid
    quant_min: Any
    quant_max: Any
    dtype: torch.dtype

    def connect(self, values: Tensor) -> Tensor:
        """`values`, which are dequantized codes without a gradient, with one."""
        result: Tensor = _Connect.apply(values, self.x, self.grid.scale, self.grid.zero_point, self)
        return result


_sources = WeakTensorKeyDictionary()


def remember(codes: Tensor, x: Tensor, grid: Grid, quant_min: Any, quant_max: Any) -> None:
    """Connect `codes` with what they were made of, if anybody may ask for a gradient."""
    if torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in (x, grid.scale, grid.zero_point)
    ):
        _sources[codes] = Source(x, grid, quant_min, quant_max, codes.dtype)


def source_of(codes: Tensor, grid: Grid) -> Source | None:
    """What `codes` were made of by the very same grid, or None."""
    source: Source | None = _sources.get(codes) if torch.is_grad_enabled() and len(_sources) else None
    return source if source is not None and source.grid.is_same(grid) else None


class _Connect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, scale: Any, zero_point: Any, source: Source) -> Tensor:
        tensors = [t if isinstance(t, Tensor) else None for t in (x, scale, zero_point)]
        ctx.save_for_backward(*tensors)
        ctx.numbers = [None if isinstance(t, Tensor) else t for t in (x, scale, zero_point)]
        grid = source.grid
        ctx.form = grid.view, grid.back, grid.adds_first, source.quant_min, source.quant_max, source.dtype
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.numbers, strict=True)
        x, scale, zero_point = (number if tensor is None else tensor for tensor, number in saved)
        view, back, adds_first, quant_min, quant_max, dtype = ctx.form
        grad, whole = view(grads[0]), view(x)
        unclamped = numerics.unclamped(whole, scale, zero_point, dtype, adds_first)
        inside = (unclamped >= quant_min) & (unclamped <= quant_max)
        _, for_x, for_scale, for_zero_point, _ = ctx.needs_input_grad
        grad_x = back(torch.where(inside, grad, 0)).to(x.dtype) if for_x else None
        grad_scale = grad_zero_point = None
        if for_scale:
            codes = numerics.saturate(unclamped, quant_min, quant_max, dtype)
            level = numerics.dequantize(codes, 1.0, zero_point, numerics.compute_dtype(x.dtype, scale))
            ratio = torch.where(inside, whole.to(level.dtype) / scale.to(level.dtype), 0)
            grad_scale = (grad * (level - ratio)).sum_to_size(scale.shape).to(scale.dtype)
        if for_zero_point:
            grad_zero_point = torch.where(inside, 0, -grad * scale).sum_to_size(zero_point.shape).to(zero_point.dtype)
        return None, grad_x, grad_scale, grad_zero_point, None
