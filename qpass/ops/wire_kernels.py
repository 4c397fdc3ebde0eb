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

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.ops.wire_format import CASTS, ROTATION, SCALES, WireFormat

SMALLEST = 2.0**-126
LARGEST = torch.finfo(torch.float32).max
_NAN_BITS = 0x7FC00000  # one NaN for all: ranks compare bytes


def encode_rows(x: Tensor, form: WireFormat, seed: Tensor, first: Tensor) -> Tensor:
    """``[rows, row] -> uint8 [rows, width]``.

    Args:
        x: any floating dtype; computed in float32, so a float64 beyond float32's range counts as infinite.
        seed, first: int64 scalars, read only by stochastic rounding: the seed, and the number of the first element in
            the tensor that `x` is a part of, so that cutting a tensor into parts does not change its codes.
    """
    if form.is_cast:
        return x.to(CASTS[form.format]).view(torch.uint8)
    rows = x.shape[0]
    x = x.to(torch.float32)
    if form.hadamard:
        x = rotate(x)
    blocks = x.reshape(rows, form.row // form.block, form.block)
    scale_bytes, scale = encode_scale(blocks.abs().amax(-1), form)
    values = blocks * (1.0 / scale).unsqueeze(-1)
    if form.format == "fp8_e4m3":
        codes = _clamp(values, form.largest).to(torch.float8_e4m3fn).view(torch.uint8).reshape(rows, form.row)
        return torch.cat([codes, scale_bytes], dim=1)
    if form.stochastic:
        index = first + torch.arange(rows * form.row, device=x.device).reshape(blocks.shape)
        values = torch.floor(values + uniform(index, seed))
    else:
        values = torch.round(values)
    biased = (_clamp(values, form.largest) + float(1 << (form.bits - 1))).reshape(rows, form.row)
    return torch.cat([*pack(biased, form.bits), scale_bytes], dim=1)


def decode_rows(payload: Tensor, form: WireFormat) -> Tensor:
    """``uint8 [rows, width] -> float32 [rows, row]``."""
    if form.is_cast:
        return payload.view(CASTS[form.format]).to(torch.float32)
    rows = payload.shape[0]
    codes = payload[:, : form.code_bytes]
    scale = decode_scale(payload[:, form.code_bytes :], form)
    if form.format == "fp8_e4m3":
        values = codes.view(torch.float8_e4m3fn).to(torch.float32)
    else:
        values = unpack(codes, form.bits).to(torch.float32) - float(1 << (form.bits - 1))
    x = (values.reshape(rows, form.row // form.block, form.block) * scale.unsqueeze(-1)).reshape(rows, form.row)
    return rotate(x) if form.hadamard else x


def reduce_rows(payloads: Tensor, form: WireFormat, divisor: int) -> Tensor:
    """``uint8 [W, rows, width] -> float32 [rows, row]``: the sum in rank order, divided by `divisor`."""
    total = decode_rows(payloads[0], form)
    for rank in range(1, payloads.shape[0]):
        total = total + decode_rows(payloads[rank], form)
    return total / divisor if divisor != 1 else total


def encode_scale(amax: Tensor, form: WireFormat) -> tuple[Tensor, Tensor]:
    """``[rows, blocks] -> bytes [rows, blocks * size], scale as it will be decoded`` (NaN where `amax` is not finite).

    bf16 rounds to nearest: that moves the largest code by less than half a step (127 * 2^-8 < 1/2), so nothing
    saturates. e8m0 takes ``floor(log2(amax))``, as the microscaling formats do, and lets the top saturate. Stochastic
    rounding would be biased where it saturates, so there both round up.
    """
    finite = amax <= LARGEST
    exact = (amax / form.largest).clamp(min=SMALLEST)
    bits = exact.view(torch.int32)
    if form.scale == "e8m0":
        if form.stochastic:
            exponent = (bits + 0x7FFFFF) >> 23
        else:
            exponent = ((amax.view(torch.int32) >> 23) - int(math.log2(form.largest))).clamp(min=1)
        stored = torch.where(finite, exponent, 255)
        scale = torch.where(finite, (exponent << 23).view(torch.float32), math.nan)
        return stored.to(torch.uint8), scale
    if form.scale == "bf16":
        carry = 0xFFFF if form.stochastic else 0x7FFF + ((bits >> 16) & 1)
        bits = (bits + carry) & -0x10000
    bits = torch.where(finite, bits, _NAN_BITS)
    return _bytes(bits, SCALES[form.scale]), bits.view(torch.float32)


def decode_scale(stored: Tensor, form: WireFormat) -> Tensor:
    """``bytes [rows, blocks * size] -> float32 [rows, blocks]``."""
    size = SCALES[form.scale]
    parts = stored.reshape(stored.shape[0], form.row // form.block, size).to(torch.int32)
    if size == 1:
        exponent = parts[..., 0]
        return torch.where(exponent == 255, _NAN_BITS, exponent << 23).view(torch.float32)
    bits = parts[..., 0] << (8 * (4 - size))
    for index in range(1, size):
        bits = bits | (parts[..., index] << (8 * (4 - size + index)))
    return bits.view(torch.float32)


def pack(codes: Tensor, bits: int) -> Sequence[Tensor]:
    """Whole numbers ``[rows, row]`` of `bits` bits, in floating point -> the bytes of each row, in pieces.

    A byte holds codes that lie far apart, so that whole vectors are packed at once: 4 bits put the second half of the
    row above the first half, 6 bits spread the last quarter over the free bits of the other three.
    """
    if bits == 8:
        return [codes.to(torch.uint8)]
    if bits == 4:
        low, high = codes.chunk(2, dim=1)
        return [(low + high * 16.0).to(torch.uint8)]
    *quarters, last = codes.to(torch.uint8).chunk(4, dim=1)
    return [quarter | (last >> (2 * place) << 6) for place, quarter in enumerate(quarters)]


def unpack(codes: Tensor, bits: int) -> Tensor:
    """The reverse of `pack`: bytes ``[rows, row * bits / 8]`` -> uint8 ``[rows, row]``."""
    if bits == 8:
        return codes
    if bits == 4:
        return torch.cat([codes & 15, codes >> 4], dim=1)
    thirds = codes.chunk(3, dim=1)
    last = (thirds[0] >> 6) | (thirds[1] >> 6 << 2) | (thirds[2] >> 6 << 4)
    return torch.cat([*(third & 63 for third in thirds), last], dim=1)


def rotate(x: Tensor) -> Tensor:
    """Every `ROTATION` elements times the orthonormal Hadamard matrix (Sylvester's), which is its own inverse.

    By butterflies, not by a matrix product: additions in a fixed order give the same bits for any number of rows.
    """
    shape = x.shape
    half = 1
    while half < ROTATION:
        pairs = x.reshape(-1, ROTATION // (2 * half), 2, half)
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


def _clamp(values: Tensor, largest: float) -> Tensor:
    """To -largest..largest, NaN to -largest: a code that no machine leaves to chance (its block's scale is NaN)."""
    values = torch.where(values > -largest, values, -largest)
    return torch.where(values < largest, values, largest)


def _bytes(bits: Tensor, size: int) -> Tensor:
    """The upper `size` bytes of int32 ``[rows, blocks]``, little-endian: ``uint8 [rows, blocks * size]``."""
    parts = [((bits >> (8 * (4 - size + index))) & 255).to(torch.uint8) for index in range(size)]
    return torch.stack(parts, dim=-1).reshape(bits.shape[0], bits.shape[1] * size)
