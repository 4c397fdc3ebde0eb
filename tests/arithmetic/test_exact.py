"""Every code of every 8- and 16-bit type against exact rational arithmetic; 8-bit floats against their definition."""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from qpass.arithmetic.numerics import FLOAT8_RANGES, RANGES
from qpass.ops import quantized_decomposed as ops

NARROW = [dtype for dtype in RANGES if dtype != torch.int32]
SCALE = 0.037109375 + 2**-20  # exact in float32, its inverse is not
ZERO_POINT = 37


def float32(exact: Fraction) -> Fraction:
    """The nearest float32, ties to even; `exact` is a product of two of them and so a double exactly."""
    assert Fraction(float(exact)) == exact
    return Fraction(struct.unpack("f", struct.pack("f", float(exact)))[0])


def inverse(scale: float) -> Fraction:
    """``1 / scale`` in float32, by rounding the rational number once."""
    exact, guess = 1 / Fraction(scale), torch.tensor(1 / scale, dtype=torch.float32)
    around = [torch.nextafter(guess, guess * side) for side in (torch.tensor(0.0), torch.tensor(2.0))]
    return min((Fraction(float(t)) for t in (guess, *around)), key=lambda candidate: abs(candidate - exact))


def exact_code(x: float, low: int, high: int) -> int:
    """The arithmetic of `numerics` in rational numbers: one float32 product, one rounding, saturation."""
    return min(max(round(float32(Fraction(x) * INVERSE)) + ZERO_POINT, low), high)


INVERSE = inverse(SCALE)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_code_decodes_to_the_exact_value_rounded_once(dtype: torch.dtype) -> None:
    low, high = RANGES[dtype]
    codes = torch.arange(low, high + 1).to(dtype)
    values = ops.dequantize_per_tensor(codes, SCALE, ZERO_POINT, low, high, dtype)
    expected = [float(float32((code - ZERO_POINT) * Fraction(SCALE))) for code in range(low, high + 1)]
    assert values.tolist() == expected
    exact = ops.dequantize_per_tensor(codes, SCALE, ZERO_POINT, low, high, dtype, out_dtype=torch.float64)
    assert exact.tolist() == [float((code - ZERO_POINT) * Fraction(SCALE)) for code in range(low, high + 1)]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_code_is_reached_exactly_where_arithmetic_says(dtype: torch.dtype) -> None:
    """At the value of each code, at the tie above it, one float32 beside the tie on either side; and far beyond."""
    low, high = RANGES[dtype]
    steps = torch.arange(low - 2, high + 3, dtype=torch.float64) - ZERO_POINT
    ties = ((steps + 0.5) * SCALE).float()
    beside = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-torch.inf, torch.inf)]
    x = torch.cat([(steps * SCALE).float(), ties, *beside, torch.tensor([1e37, -1e37, 1e-40])])
    codes = ops.quantize_per_tensor(x, SCALE, ZERO_POINT, low, high, dtype).tolist()
    expected = [exact_code(value, low, high) for value in x.tolist()]
    assert sum(found != right for found, right in zip(codes, expected, strict=True)) == 0
    assert set(codes) == set(range(low, high + 1))
    scales, zero_points = torch.full((2,), SCALE), torch.full((2,), ZERO_POINT, dtype=torch.int32)
    per_channel = ops.quantize_per_channel(torch.stack([x, -x]), scales, zero_points, 0, low, high, dtype)
    assert per_channel[0].tolist() == expected


# 8-bit floats: sign, exponent, mantissa, by the OCP standard (e4m3fn, e5m2) and by Graphcore's and AMD's (fnuz)
FORMS = {
    torch.float8_e4m3fn: (4, 3, 7),
    torch.float8_e5m2: (5, 2, 15),
    torch.float8_e4m3fnuz: (4, 3, 8),
    torch.float8_e5m2fnuz: (5, 2, 16),
}


def decoded(bits: int, dtype: torch.dtype) -> Fraction | None:
    """The number that the bits stand for, or None where they stand for NaN or an infinity."""
    exponent_bits, mantissa_bits, bias = FORMS[dtype]
    sign = -1 if bits >> 7 else 1
    exponent, mantissa = (bits & 0x7F) >> mantissa_bits, bits & ((1 << mantissa_bits) - 1)
    special = bits == 0x80 if bias in (8, 16) else bits & 0x7F == 0x7F
    if special or (dtype == torch.float8_e5m2 and exponent == (1 << exponent_bits) - 1):
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 1 << mantissa_bits) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(mantissa, 1 << mantissa_bits)) * Fraction(2) ** (exponent - bias)


@pytest.mark.parametrize("dtype", FORMS, ids=str)
def test_every_float8_code_decodes_exactly(dtype: torch.dtype) -> None:
    low, high = FLOAT8_RANGES[dtype]
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype)
    values = ops.dequantize_per_tensor(codes, SCALE, 0, low, high, dtype).tolist()
    numbers = [decoded(bits, dtype) for bits in range(256)]
    found = [value for value, number in zip(values, numbers, strict=True) if number is not None]
    assert found == [float(float32(number * Fraction(SCALE))) for number in numbers if number is not None]
    assert max(number for number in numbers if number is not None) == high


def all_values(dtype: torch.dtype) -> Tensor:
    """Every value of a 16-bit floating-point type, NaN and infinities included."""
    return torch.arange(1 << 16).to(torch.uint16).view(dtype)


@pytest.mark.parametrize("dtype", FORMS, ids=str)
def test_float8_is_the_nearest_code_and_the_cast(dtype: torch.dtype) -> None:
    """For every bfloat16 and float16 value: bit-equal to the cast of the scaled value; a sample to the definition."""
    low, high = FLOAT8_RANGES[dtype]
    for source in (torch.bfloat16, torch.float16):
        x = all_values(source)
        codes = ops.quantize_per_tensor(x, SCALE, 0, low, high, dtype)
        scaled = x.float() * (1 / SCALE)
        assert torch.equal(codes.view(torch.uint8), scaled.clamp(low, high).to(dtype).view(torch.uint8))
        assert torch.equal(codes.float().isnan(), x.isnan())
        within = (scaled.abs() <= high).nonzero().flatten()
        assert torch.equal(codes[within].view(torch.uint8), scaled[within].to(dtype).view(torch.uint8))
        numbers = {number: bits for bits in range(256) if (number := decoded(bits, dtype)) is not None}
        for index in within[:: max(1, len(within) // 400)].tolist():
            exact = Fraction(scaled[index].item())
            nearest = min(numbers, key=lambda number, exact=exact: (abs(number - exact), numbers[number] & 1))
            assert Fraction(codes[index].float().item()) == nearest
