"""x <-> rows of bytes: the arithmetic of every wire format, in plain ATen that Inductor fuses.

For a block with ``amax = max |x|``, all in float32::

    scale = encode_scale(max(amax / largest, 2^-126))         no epsilon: gradients of 1e-30 keep their digits
    code  = clamp(round(x * (1 / scale)), -largest, largest)  stored as code + 2^(bits - 1), so never negative
    value = code * scale

2^-126 is the smallest normal float32: below it ``1 / scale`` would overflow. A block that holds a NaN or an infinity
gets a NaN for its scale and decodes to NaN altogether; no other block does. Everything here is elementwise or a
maximum, so eager and compiled code give the same bits, whatever the number of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from qpass.ops.wire_format import ROTATION, WireFormat

Keep = Callable[[Tensor], Tensor]

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "e8m0": torch.uint8}
"""Scale format -> the dtype that a scale is read as."""

SCALE_BITS = {"bf16": torch.int16, "fp32": torch.int32, "e8m0": torch.uint8}
"""Scale format -> the dtype that a scale's bits are written as: a float's NaN would have bits of the CPU's choice."""

SMALLEST = 2.0**-126
LARGEST = torch.finfo(torch.float32).max
_NAN_BITS = 0x7FC00000  # one NaN for all: ranks compare bytes


def encode_rows(
    x: Tensor, form: WireFormat, numbers: Sequence[Tensor] = (), keep: Keep = lambda x: x
) -> tuple[Tensor, Tensor]:
    """``[rows, row] -> codes uint8 [rows, code_bytes], scales [rows, row / block]`` of the dtype in `SCALE_BITS`.

    Args:
        x: any floating dtype; computed in float32, so a float64 beyond float32's range counts as infinite.
        numbers: two int64 scalars for stochastic rounding: the seed, and the number of the first element in the tensor
            that `x` is a part of, so that cutting a tensor into parts does not change its codes.
        keep: applied to what is computed once a block and read by every element: a compiler's hint to store it.
    """
    rows = x.shape[0]
    x = x.to(torch.float32)
    if form.hadamard:
        x = rotate(x)
    blocks = x.reshape(rows, form.row // form.block, form.block)
    amax = blocks.abs().amax(-1)
    finite = amax <= LARGEST
    stored, scale = encode_scale(amax, finite, form)
    values = torch.where(finite.unsqueeze(-1), blocks * keep(1.0 / scale).unsqueeze(-1), 0.0)
    if form.format == "fp8_e4m3":
        codes = values.clamp(-form.largest, form.largest).to(torch.float8_e4m3fn).view(torch.uint8)
        return codes.reshape(rows, form.row), stored
    if form.stochastic:
        seed, first = numbers
        index = first + torch.arange(rows * form.row, device=x.device).reshape(blocks.shape)
        values = torch.floor(values + uniform(index, seed))
    else:
        values = torch.round(values)
    if form.saturates or form.stochastic:  # the latter where adding the random number rounds up to the next code
        values = values.clamp(-form.largest, form.largest)
    return pack((values + float(1 << (form.bits - 1))).reshape(rows, form.row), form.bits), stored


def decode_rows(codes: Tensor, stored: Tensor, form: WireFormat) -> list[Tensor]:
    """Codes as `encode_rows` returns them, scales of the dtype in `SCALE_DTYPES` ``-> float32``, in equal pieces.

    The pieces, side by side, are ``[rows, row]``; a row of packed codes comes apart into as many as a byte's codes are
    far from each other (`form.pieces`), and a compiler writes each where it belongs.
    """
    scale = decode_scale(stored, form)
    if form.format == "fp8_e4m3":
        parts = [codes.view(torch.float8_e4m3fn).to(torch.float32)]
    else:
        parts = [part.to(torch.float32) - float(1 << (form.bits - 1)) for part in unpack(codes, form.bits)]
    values = _scaled(parts, scale, form)
    return [rotate(torch.cat(values, dim=1))] if form.hadamard else values


def reduce_rows(payloads: Iterable[tuple[Tensor, Tensor]], form: WireFormat, divisor: int) -> list[Tensor]:
    """Codes and scales of every rank -> the sum of what they decode to, in their order, over `divisor`; in pieces."""
    decoded = (decode_rows(codes, stored, form) for codes, stored in payloads)
    total = functools.reduce(lambda sums, values: [a + b for a, b in zip(sums, values, strict=True)], decoded)
    return [value / divisor for value in total] if divisor != 1 else total


def encode_scale(amax: Tensor, finite: Tensor, form: WireFormat) -> tuple[Tensor, Tensor]:
    """``amax [rows, blocks] -> the scale as it is stored, the scale as it will be decoded``: NaN where not `finite`.

    bf16 rounds to nearest: that moves the largest code by less than half a step (127 * 2^-8 < 1/2), so nothing
    saturates; stochastic rounding would be biased where it does, and rounds the scale up. e8m0 takes
    ``floor(log2(amax))``, as MXINT8 does, where the top may saturate (`WireFormat.saturates`), and rounds up elsewhere.
    """
    bits = (amax / form.largest).clamp(min=SMALLEST).view(torch.int32)
    if form.scale == "e8m0":
        if form.saturates:
            exponent = ((amax.view(torch.int32) >> 23) - int(math.log2(form.largest))).clamp(min=1)
        else:
            exponent = (bits + 0x7FFFFF) >> 23
        stored = torch.where(finite, exponent, 255).to(torch.uint8)
        return stored, torch.where(finite, exponent << 23, _NAN_BITS).view(torch.float32)
    if form.scale == "bf16":
        bits = (bits + (0xFFFF if form.stochastic else 0x7FFF + ((bits >> 16) & 1))) & -0x10000
    bits = torch.where(finite, bits, _NAN_BITS)
    return (bits >> 16).to(torch.int16) if form.scale == "bf16" else bits, bits.view(torch.float32)


def decode_scale(stored: Tensor, form: WireFormat) -> Tensor:
    """Scales of the dtype in `SCALE_DTYPES` ``-> float32``, of the same shape."""
    if form.scale == "e8m0":
        exponent = stored.to(torch.int32)
        return torch.where(exponent == 255, _NAN_BITS, exponent << 23).view(torch.float32)
    return stored.to(torch.float32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Whole numbers ``[rows, row]`` of `bits` bits, in floating point ``-> uint8 [rows, row * bits / 8]``.

    A byte holds codes that lie far apart, so that whole vectors are packed at once: 4 bits put the second half of the
    row above the first half, 6 bits spread the last quarter over the free bits of the other three.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 4:
        low, high = codes.chunk(2, dim=1)
        return (low + high * 16.0).to(torch.uint8)
    *quarters, last = codes.to(torch.uint8).chunk(4, dim=1)
    return torch.cat([quarter | (last >> (2 * place) << 6) for place, quarter in enumerate(quarters)], dim=1)


def unpack(codes: Tensor, bits: int) -> list[Tensor]:
    """The reverse of `pack`: bytes ``[rows, row * bits / 8]`` -> uint8 pieces that are ``[rows, row]`` side by side."""
    if bits == 8:
        return [codes]
    if bits == 4:
        return [codes & 15, codes >> 4]
    thirds = codes.chunk(3, dim=1)
    last = (thirds[0] >> 6) | (thirds[1] >> 6 << 2) | (thirds[2] >> 6 << 4)
    return [*(third & 63 for third in thirds), last]


def rotate(x: Tensor) -> Tensor:
    """Every `ROTATION` elements times the orthonormal Hadamard matrix (Sylvester's), which is its own inverse.

    By butterflies, not by a matrix product: additions in a fixed order give the same bits for any number of rows.
    """
    shape, half = x.shape, 1
    count = math.prod(shape) // ROTATION  # spelled out: of nothing, a reshape could not tell
    while half < ROTATION:
        pairs = x.reshape(count, ROTATION // (2 * half), 2, half)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack([low + high, low - high], dim=2)
        half *= 2
    return (x * ROTATION**-0.5).reshape(shape)


def uniform(index: Tensor, seed: Tensor) -> Tensor:
    """A number in [0, 1) of 24 random bits for every element number, from nothing but the number and the seed.

    Two rounds of a 32-bit integer hash (multiply and fold, both multipliers 0x45D9F3B), kept below 2^63 so that it
    needs no wrap-around, which Python, C++ and Triton do not promise alike.
    """
    low, high = index & 0xFFFFFFFF, index >> 32
    mixed = _mix(low ^ (seed & 0xFFFFFFFF))
    mixed = _mix(mixed ^ (((seed >> 32) ^ (high * 0x9E3779B1)) & 0xFFFFFFFF))
    return (mixed >> 8).to(torch.float32) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _scaled(parts: list[Tensor], scale: Tensor, form: WireFormat) -> list[Tensor]:
    """Every part ``[rows, row / parts]`` times the scales ``[rows, blocks]`` of its elements.

    Where a part is whole blocks, or lies in one, its scales are broadcast, which vectorizes; elsewhere they are copied.
    """
    size, rows = form.row // len(parts), scale.shape[0]
    if size % form.block == 0:
        own = scale.unsqueeze(-1).chunk(len(parts), dim=1)
        blocks = [part.reshape(rows, size // form.block, form.block) for part in parts]
        return [(part * a).reshape(rows, size) for part, a in zip(blocks, own, strict=True)]
    if form.block % size == 0:
        firsts = (index * size // form.block for index in range(len(parts)))
        return [part * scale[:, first : first + 1] for part, first in zip(parts, firsts, strict=True)]
    each = scale.unsqueeze(-1).expand(-1, -1, form.block).reshape(rows, form.row).chunk(len(parts), dim=1)
    return [part * own for part, own in zip(parts, each, strict=True)]
