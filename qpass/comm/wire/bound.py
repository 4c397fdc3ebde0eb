"""The bound of every codec: how far ``decode(encode(x))`` is from `x` at most. Tests check it.

A code is off by half a step: a whole one where rounding is stochastic, or where the largest value may saturate. A step
is the block's largest magnitude over the largest code, and what rounding the scale adds to it. fp8 and the casts are
off by half a unit in the last place of the value itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.comm.wire.format import CASTS, ROTATION, WireFormat
from qpass.comm.wire.kernels import LARGEST, SMALLEST, rotate

SLACK = 2.0**-20
"""For the few float32 roundings of computing a code and a value, 2^-24 each: a share of the value."""

_FP8_HALF_ULP, _FP8_SMALLEST_HALF = 2.0**-4, 2.0**-10  # e4m3: 3 bits behind the point, subnormals 2^-9 apart


def error_bound(form: WireFormat, x: Tensor) -> Tensor:
    """float64, shaped like `x`: for every element, the largest error in float32. NaN where its block is lost.

    A rotation spreads the error of one code over 128 elements; those of 128 codes add up to at most sqrt(128) times
    the largest of them.
    """
    flat = x.detach().reshape(-1).to(torch.float64)
    if form.is_cast:
        info = torch.finfo(CASTS[form.format])
        bound = (flat.abs() * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps / 2)
        return torch.where(flat.abs() <= info.max, bound, torch.nan).reshape(x.shape)
    padded = torch.zeros(form.rows(flat.numel()) * form.row, dtype=torch.float64, device=x.device)
    padded[: flat.numel()] = flat
    sent = rotate(padded) if form.hadamard else padded
    blocks = sent.reshape(-1, form.block)
    amax = blocks.abs().amax(1, keepdim=True)
    step = (amax * largest_step(form)).clamp(min=SMALLEST)
    if form.format == "fp8_e4m3":
        bound = torch.maximum(blocks.abs() * _FP8_HALF_ULP, step * _FP8_SMALLEST_HALF)
    else:
        bound = (step * steps_off(form)).expand_as(blocks)
    bound = torch.where(amax <= LARGEST, bound, torch.nan) + SLACK * blocks.abs()
    if form.hadamard:
        around = bound.reshape(-1, ROTATION)
        bound = (around.amax(1, keepdim=True) * ROTATION**0.5).expand_as(around)
    return bound.reshape(-1)[: flat.numel()].reshape(x.shape)


def largest_step(form: WireFormat) -> float:
    """The largest step of a block, as a share of its largest magnitude."""
    if form.scale == "e8m0":
        return 2.0 ** (2 - form.bits) if form.saturates else 2.0 / form.largest
    rounding = {"bf16": 2.0**-7 if form.stochastic else 2.0**-8, "fp32": 2.0**-23}[form.scale]
    return (1.0 + rounding) / form.largest


def steps_off(form: WireFormat) -> float:
    """Steps that a code may be off."""
    return 1.0 if form.stochastic or form.saturates else 0.5


def describe(form: WireFormat) -> str:
    """One line for people: the written form, bits an element, and the bound."""
    if form.is_cast:
        return f"{form}: {form.bits} bits, off by at most {torch.finfo(CASTS[form.format]).eps / 2:.2g} of a value"
    cost = f"{form}: {form.bits_per_element:.4g} bits"
    if form.format == "fp8_e4m3":
        return f"{cost}, off by at most {_FP8_HALF_ULP:.2g} of a value"
    share = largest_step(form) * steps_off(form)
    return f"{cost}, off by at most {share:.2g} of its block's largest" + ", rotated" * form.hadamard
