"""x <-> rows of bytes: the arithmetic of every wire format, in plain ATen that Inductor fuses.

For a block with ``amax = max |x|``, all in float32::

    scale = encode_scale(max(amax / largest, 2^-126))         no epsilon: gradients of 1e-30 keep their digits
    code  = clamp(round(x * (1 / scale)), -largest, largest)  8 bits in two's complement; fewer as code + 2^(bits - 1)
    value = code * scale

2^-126 is the smallest normal float32: below it ``1 / scale`` would overflow. A block that holds a NaN or an infinity
gets a NaN for its scale and decodes to NaN altogether; no other block does. Everything here is elementwise, a sum in a
fixed order or a maximum, so eager and compiled code give the same bits, whatever the number of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qpass.comm.wire.format import ROTATION, WireFormat

SCALE_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "e8m0": torch.uint8}
"""Scale format -> the dtype that a scale is read as."""

SCALE_BITS = {"bf16": torch.int16, "fp32": torch.int32, "e8m0": torch.uint8}
"""Scale format -> the dtype that a scale's bits are written as: a float's NaN would have bits of the CPU's choice."""

SMALLEST = 2.0**-126
LARGEST = torch.finfo(torch.float32).max
_NAN_BITS = 0x7FC00000  # one NaN for all: ranks compare bytes


def hadamard(size: int, device: torch.device) -> Tensor:
    """``float32 [size, size]`` of ones, each with the sign of the parity of ``row & column``; sizes up to 16."""
    index = torch.arange(size, device=device)
    common = index.unsqueeze(1) & index
    return 1.0 - 2.0 * ((common ^ (common >> 1) ^ (common >> 2) ^ (common >> 3)) & 1).to(torch.float32)


class Hints(NamedTuple):
    """What a compiler needs to be told for speed; no value depends on it.

    Attributes:
        keep: applied to what is computed once and read many times: store it.
        matrix: `hadamard`, or the same as a constant, where a graph may hold one.
    """

    keep: Callable[[Tensor], Tensor] = lambda x: x
    matrix: Callable[[int, torch.device], Tensor] = hadamard


NONE = Hints()


def encode_rows(
    x: Tensor, form: WireFormat, numbers: Sequence[Tensor] = (), hints: Hints = NONE
) -> tuple[list[Tensor], Tensor]:
    """``[rows, row] -> codes, scales [rows, row / block]`` of the dtype in `SCALE_BITS`.

    The codes are `form.code_pieces` tensors, which side by side are ``[rows, code_bytes]``: uint8, or float8 for fp8.

    Args:
        x: any floating dtype; computed in float32, so a float64 beyond float32's range counts as infinite.
        numbers: two int64 scalars for stochastic rounding: the seed, and the number of the first element in the tensor
            that `x` is a part of, so that cutting a tensor into parts does not change its codes.
    """
    rows = x.shape[0]
    x = x.to(torch.float32)
    if form.hadamard:
        x = hints.keep(rotate(x, hints))
    blocks = x.reshape(rows, form.row // form.block, form.block)
    amax = blocks.abs().amax(-1)
    finite = amax <= LARGEST
    stored, scale = encode_scale(amax, finite, form)
    values = blocks * hints.keep(1.0 / scale).unsqueeze(-1)
    if form.format == "fp8_e4m3":
        # At most 448 * (1 + 2^-8), which rounds to 448: nothing saturates. A NaN's sign is the processor's choice.
        codes = torch.where(finite.unsqueeze(-1), values, 0.0).to(torch.float8_e4m3fn)
        return [codes.reshape(rows, form.row)], stored
    if form.stochastic:
        seed, first = numbers
        index = first + torch.arange(rows * form.row, device=x.device).reshape(blocks.shape)
        values = torch.floor(values + uniform(index, seed))
    else:
        values = torch.round(values)
    whole = values.to(torch.int32)  # of a lost block's NaNs something, which its scale makes NaN again
    if form.saturates or form.stochastic:  # the latter where adding the random number rounds up to the next code
        whole = whole.clamp(-int(form.largest), int(form.largest))
    return pack(whole.reshape(rows, form.row), form.bits), stored


def decode_rows(codes: Tensor, stored: Tensor, form: WireFormat, hints: Hints = NONE) -> list[Tensor]:
    """Codes uint8 ``[rows, code_bytes]``, scales of the dtype in `SCALE_DTYPES` ``-> float32``, in equal pieces.

    The pieces, side by side, are ``[rows, row]``; a row of packed codes comes apart into as many as a byte's codes are
    far from each other (`form.pieces`), and a compiler writes each where it belongs.
    """
    scale = decode_scale(stored, form)
    if form.format == "fp8_e4m3":
        parts = [codes.view(torch.float8_e4m3fn).to(torch.float32)]
    else:
        parts = unpack(codes, form.bits)
    values = _scaled(parts, scale, form)
    return [rotate(torch.cat(values, dim=1), hints)] if form.hadamard else values


def reduce_rows(
    payloads: Iterable[tuple[Tensor, Tensor]], form: WireFormat, divisor: int, hints: Hints = NONE
) -> list[Tensor]:
    """Codes and scales of every rank -> the sum of what they decode to, in their order, over `divisor`; in pieces."""
    decoded = (decode_rows(codes, stored, form, hints) for codes, stored in payloads)
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


def pack(codes: Tensor, bits: int) -> list[Tensor]:
    """int32 ``[rows, row]`` of `bits` bits, signed ``-> uint8`` pieces, ``[rows, row * bits / 8]`` side by side.

    A byte holds codes that lie far apart, so that whole vectors are packed at once: 4 bits put the second half of the
    row above the first half, 6 bits spread the last quarter over the free bits of the other three.
    """
    if bits == 8:
        return [codes.to(torch.uint8)]
    codes = codes + (1 << (bits - 1))
    if bits == 4:
        low, high = codes.chunk(2, dim=1)
        return [(low + high * 16).to(torch.uint8)]
    *quarters, last = codes.chunk(4, dim=1)
    two_bits = ((last * times) & 0xC0 for times in (64, 16, 4))
    return [(quarter + two).to(torch.uint8) for quarter, two in zip(quarters, two_bits, strict=True)]


def unpack(codes: Tensor, bits: int) -> list[Tensor]:
    """The reverse of `pack`: bytes ``[rows, row * bits / 8]`` -> float32 pieces, ``[rows, row]`` side by side."""
    if bits == 8:
        return [codes.view(torch.int8).to(torch.float32)]
    if bits == 4:
        parts = [codes & 15, codes >> 4]
    else:
        thirds = codes.chunk(3, dim=1)
        last = (thirds[0] >> 6) | (thirds[1] >> 6 << 2) | (thirds[2] >> 6 << 4)
        parts = [*(third & 63 for third in thirds), last]
    return [part.to(torch.float32) - float(1 << (bits - 1)) for part in parts]


def rotate(x: Tensor, hints: Hints = NONE) -> Tensor:
    """Every `ROTATION` elements times the orthonormal Hadamard matrix (Sylvester's), which is its own inverse.

    It is the Kronecker product of one of 8 and one of 16: sums of 16 neighbours, then of 8 such sums. Both are taken
    term by term, not by a matrix product: additions in a fixed order give the same bits for any number of rows.
    """
    count = math.prod(x.shape) // ROTATION  # spelled out: of nothing, a reshape could not tell
    rows = x.reshape(count, ROTATION // 16, 16)
    inside, across = hints.matrix(16, x.device), hints.matrix(8, x.device)
    sums = hints.keep(_sum(rows[:, :, place : place + 1] * inside[place] for place in range(16)))
    total = _sum(sums[:, place : place + 1] * across[place].unsqueeze(1) for place in range(8))
    return (total * ROTATION**-0.5).reshape(x.shape)


def _sum(terms: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, terms)


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
