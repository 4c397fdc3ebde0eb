"""x -> dequantize(quantize(x)): the values of a q/dq pair, bit for bit, and the straight-through gradient.

The derivative of rounding is 0 almost everywhere, which would teach nothing. The straight-through estimator (Bengio et
al. 2013, https://arxiv.org/abs/1308.3432) takes 1 inside the range and 0 where the code is clamped.

It is written as an ``autograd.Function`` over plain ATen: Dynamo traces it into the one graph, export too, Inductor
fuses it into its neighbours, ``vmap`` maps it, and only a mask is kept for the backward pass. The common formulation
``x + (rounded - x).detach()`` is none of this library's: its sum is not the rounded value to the last bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass import numerics
from qpass.spec import Granularity, PerChannel, PerGroup, PerToken


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, granularity: Granularity
) -> Tensor:
    """The values that x has after ``quantize`` and ``dequantize``, in the dtype of x.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        scale, zero_point: one element per tensor; ``[C]`` per channel; ``[..., K / group_size]`` per group;
            ``[..., 1]`` per token.

    Returns:
        shaped like x. The gradient of x passes where the code lies within ``quant_min..quant_max`` before it is
        clamped; scale and zero_point have none.
    """
    grouped, scale, zero_point = aligned(x, scale, zero_point, granularity)
    rounded, _ = StraightThrough.apply(grouped, scale, zero_point, quant_min, quant_max)
    return rounded.reshape(x.shape)


def aligned(x: Tensor, scale: Tensor, zero_point: Tensor, granularity: Granularity) -> tuple[Tensor, Tensor, Tensor]:
    """x with a dimension for its groups, if it has any, and qparams that broadcast with it."""
    if isinstance(granularity, PerChannel):
        shape = [1] * x.dim()
        shape[granularity.axis] = -1
        return x, scale.reshape(shape), zero_point.reshape(shape)
    if isinstance(granularity, PerGroup):
        return x.unflatten(-1, (-1, granularity.group_size)), scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    if isinstance(granularity, PerToken):
        return x, scale, zero_point
    return x, scale.reshape(()), zero_point.reshape(())


class StraightThrough(torch.autograd.Function):
    """``(codes - zero_point) * scale`` and the mask of what was not clamped; the arithmetic is `qpass.numerics`'s."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int) -> tuple[Tensor, Tensor]:
        compute = numerics.compute_dtype(x.dtype, scale)
        inverse = (1.0 / scale).to(compute)
        codes = torch.round(x.to(compute) * inverse) + zero_point.to(compute)
        inside = (codes >= quant_min) & (codes <= quant_max)
        codes = numerics.saturate(codes, quant_min, quant_max, compute)
        return ((codes - zero_point.to(compute)) * scale.to(compute)).to(x.dtype), inside

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Any, ...]:
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradient, 0.0), None, None, None, None
