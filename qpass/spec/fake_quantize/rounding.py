"""x -> the values its codes stand for, with a gradient that passes straight through.

With ``u = round(x / s) + z``, ``code = clamp(u, quant_min, quant_max)`` and ``value = (code - z) * s``, by the
arithmetic of `qpass.arithmetic.numerics`, "inside" meaning that ``u`` lies within the codes:

    d value / d x = 1 inside, 0 outside        (NaN is outside)         Bengio et al. 2013, clipped
    d value / d s = u - z - x / s inside, code - z outside              Esser et al. 2020 (LSQ)

The gradient is attached by two ATen operators: ``y = where(passes, x, 0)`` has the right gradient and the wrong values,
and the right values are then written over them through a detached view, which autograd does not see. That is exact:
``x + (value - x).detach()``, the usual form, rounds, and makes NaN of infinities. It is traced by Dynamo without a
break and keeps its gradient in an exported graph, where a ``torch.autograd.Function`` leaves only its forward; and
Inductor fuses all of it into one loop, where a custom operator would be a wall.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qpass.arithmetic import numerics
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec


def straight_through(y: Tensor, value: Tensor) -> Tensor:
    """The values of `value`, bit for bit, with the gradient of `y`: a new tensor that nobody else holds."""
    y.detach().copy_(value)
    return y


def recomputed(rounds: Callable[[Tensor, Tensor], Tensor], x: Tensor, on: Tensor) -> Tensor:
    """``rounds(x, on)``; under ``torch.compile`` its backward starts from `x` again, whatever the compiler would save.

    By itself the compiler saves the mask "inside", a byte an element; Inductor writes and reads bools on a CPU element
    by element, which takes ten times as long as all the rest. Where the gradient of the producer of `x` needs `x` as
    well, it is kept anyway; elsewhere this costs the memory of `x` until its backward.
    """
    compiles = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    if compiles and torch.is_grad_enabled():
        y: Tensor = checkpoint(rounds, x, on, use_reentrant=False, preserve_rng_state=False)
        return y
    return rounds(x, on)


def decoded(x: Tensor, scale: Tensor, zero_point: Tensor, spec: QuantizationSpec) -> tuple[Tensor, Tensor, Tensor]:
    """``dequantize(quantize(x))``, and what its gradients are made of. Nothing here is differentiated.

    Zero points of tokens, and those that are no integers, are added before ``x / s + z`` is rounded: the operators for
    tokens do that, and another order would make no whole codes.

    Args:
        x: fp16, bf16, float32 or float64, any shape.
        scale, zero_point: broadcast with `x`.

    Returns:
        value: dtype and shape of `x`.
        inside: bool, where `x` was not clamped.
        unclamped: the codes before they were clamped, in the dtype that was computed in.
    """
    x, scale = x.detach(), scale.detach()
    low, high = spec.range
    adds_first = isinstance(spec.granularity, PerToken) or zero_point.is_floating_point()
    unclamped = numerics.unclamped(x, scale, zero_point, spec.dtype, adds_first)
    inside = (unclamped >= low) & (unclamped <= high)
    # codes of up to 16 bits stay in the floating dtype they were computed in, where they are exact
    codes = numerics.saturate(unclamped, low, high, spec.dtype if numerics.is_wide(spec.dtype) else unclamped.dtype)
    return numerics.dequantize(codes, scale, zero_point, x.dtype), inside, unclamped


def aligned(x: Tensor, qparam: Tensor, spec: QuantizationSpec) -> Tensor:
    """`qparam`, shaped as `FakeQuantize` keeps it, as a tensor that broadcasts with ``grouped(x)``."""
    if isinstance(spec.granularity, PerTensor):
        return qparam.reshape(())
    if isinstance(spec.granularity, PerChannel):
        axis = spec.granularity.axis % x.dim()
        return qparam.reshape([-1 if dim == axis else 1 for dim in range(x.dim())])
    return qparam.unsqueeze(-1) if isinstance(spec.granularity, PerGroup) else qparam


def grouped(x: Tensor, spec: QuantizationSpec) -> Tensor:
    """`x` with its groups, if it has any, in a dimension of their own behind the others."""
    return x.unflatten(-1, (-1, spec.granularity.group_size)) if isinstance(spec.granularity, PerGroup) else x
