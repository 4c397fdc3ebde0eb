from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.ao.quantization.utils import determine_qparams

from qpass.arithmetic import numerics
from qpass.arithmetic import tiling as blocks
from qpass.ops import graph_ops as qd
from qpass.ops import quantized_decomposed

BOUNDS = [(torch.int8, -128, 127), (torch.int8, -127, 127), (torch.int8, -8, 7), (torch.uint8, 0, 255)]


def near_ties(scale: float, count: int = 1 << 20) -> Tensor:
    """Multiples of half a scale, each as it is, one float above or one below; then large, tiny and signed zeros."""
    ties = (torch.randint(-600, 600, (count,)) / 2 * scale).float()
    toward = torch.tensor([-torch.inf, torch.inf])[torch.randint(0, 2, (count,))]
    x = torch.where(torch.rand(count) < 0.6, torch.nextafter(ties, toward), ties)
    x[:8] = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e-40, -1e-40, 0.0, -0.0])
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("code_dtype", "low", "high"), BOUNDS)
def test_codes_and_values_equal_torchs(code_dtype: torch.dtype, low: int, high: int, dtype: torch.dtype) -> None:
    scale = torch.tensor(0.0371)
    x = near_ties(0.0371).to(dtype)
    for zero_point in (0, 3):
        arguments = (float(scale), zero_point, low, high, code_dtype)
        expected = qd.quantize_per_tensor.default(x, *arguments)
        for s, z in ((scale, torch.tensor(zero_point, dtype=torch.int32)), (float(scale), zero_point)):
            codes = numerics.quantize(x, s, z, low, high, code_dtype)
            assert codes.dtype == code_dtype
            assert torch.equal(codes, expected)
            values = numerics.dequantize(codes, s, z)
            assert torch.equal(values, qd.dequantize_per_tensor.default(codes, *arguments))


def test_an_inverse_taken_in_double_or_in_float_is_the_same() -> None:
    scale = torch.cat([torch.rand(1 << 20), torch.rand(1 << 20) * 1e-6]) + 1e-9
    assert torch.equal(1.0 / scale, (1.0 / scale.double()).float())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("dtype", "low", "high"), BOUNDS)
def test_qparams_equal_torchs(dtype: torch.dtype, low: int, high: int, symmetric: bool) -> None:
    ends = torch.randn(2, 4096).sort(dim=0).values * 10 ** torch.empty(4096).uniform_(-8, 8)
    min_val, max_val = ends
    scheme = torch.per_channel_symmetric if symmetric else torch.per_channel_affine
    eps = torch.tensor([numerics.EPS])
    expected = determine_qparams(min_val, max_val, low, high, dtype, eps, False, scheme)
    scale, zero_point = numerics.choose_qparams(min_val, max_val, low, high, symmetric)
    assert (scale.dtype, zero_point.dtype) == (torch.float32, torch.int32)
    assert torch.equal(scale.double(), expected[0])
    assert torch.equal(zero_point.long(), expected[1])


def test_every_value_of_the_range_is_within_half_a_scale() -> None:
    for dtype, low, high in BOUNDS:
        scale, zero_point = numerics.choose_qparams(torch.tensor(-1.7), torch.tensor(3.1), low, high, symmetric=True)
        x = torch.linspace(-3.1, 3.1, 100_001)
        error = numerics.dequantize(numerics.quantize(x, scale, zero_point, low, high, dtype), scale, zero_point) - x
        assert error.abs().max() <= scale * (0.5 + 1e-4)  # 1e-4: float32 rounding of values 128 scales large


@pytest.mark.parametrize("symmetric", [True, False])
def test_qparams_are_finite_whatever_the_range(symmetric: bool) -> None:
    inf, nan, big = torch.inf, torch.nan, 3.4e38
    min_val = torch.tensor([nan, -inf, -big, 0.0, inf, -1.0])
    max_val = torch.tensor([1.0, inf, big, 0.0, -inf, nan])
    scale, zero_point = numerics.choose_qparams(min_val, max_val, -128, 127, symmetric)
    assert scale.isfinite().all()
    assert (scale >= numerics.EPS).all()
    assert ((zero_point >= -128) & (zero_point <= 127)).all()
    assert scale[3] == numerics.EPS


def test_the_middle_of_unsigned_codes_is_their_symmetric_zero() -> None:
    one = torch.tensor(1.0)
    assert numerics.choose_qparams(-one, one, 0, 255, symmetric=True)[1] == 128
    assert numerics.choose_qparams(-one, one, 0, 15, symmetric=True)[1] == 8
    assert numerics.choose_qparams(-one, one, -8, 7, symmetric=True)[1] == 0


def test_infinities_saturate_and_nan_takes_the_lowest_code() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e30])
    for dtype, low, high in [*BOUNDS, (torch.int32, -(2**31), 2**31 - 1)]:
        assert numerics.quantize(x, 0.1, 0, low, high, dtype).tolist() == [high, low, low, high]


def test_int32_codes_are_exact() -> None:
    """Torch adds the zero point in float32, and turns what is too large into the smallest code."""
    x = torch.tensor([1e10, -1e10, 100.0, 8388609.0])
    codes = numerics.quantize(x, 1.0, 2**30 + 1, -(2**31), 2**31 - 1, torch.int32)
    assert codes.tolist() == [2**31 - 1, -(2**31), 2**30 + 101, 2**30 + 8388610]
    assert numerics.dequantize(codes, 1.0, 2**30 + 1).tolist()[2:] == [100.0, 8388609.0]


def test_a_narrow_zero_point_does_not_wrap() -> None:
    codes = torch.tensor([-128], dtype=torch.int8)
    assert numerics.dequantize(codes, torch.tensor(1.0), torch.tensor(100, dtype=torch.int8)).item() == -228.0


def test_float64_is_computed_in_float64() -> None:
    x = torch.tensor([2.5 + 1e-12, 2.5 - 1e-12], dtype=torch.float64)
    assert numerics.quantize(x, 1.0, 0, -8, 7, torch.int8).tolist() == [3, 2]


def test_all_codes_decode_to_the_rounded_exact_value() -> None:
    codes = torch.arange(256).to(torch.uint8)
    scale = torch.tensor(0.0371)
    values = numerics.dequantize(codes, scale, torch.tensor(37, dtype=torch.int32))
    exact = [float(torch.tensor(float((c - 37) * Fraction(scale.item())))) for c in range(256)]
    assert values.tolist() == exact


@pytest.mark.parametrize("axis", [None, 0, 1, -1])
@pytest.mark.parametrize("shape", [(7, 5, 3), (300, 2000), (1, 700_000), (3, 2, 150_000)])
def test_quantize_weight_equals_quantize(shape: tuple[int, ...], axis: int | None) -> None:
    w = torch.randn(shape)
    count = 1 if axis is None else shape[axis]
    scale, zero_point = torch.rand(count) * 0.1 + 0.01, torch.randint(-3, 3, (count,), dtype=torch.int32)
    qparams_shape = [1] * len(shape)
    if axis is not None:
        qparams_shape[axis] = count
    s, z = scale.view(qparams_shape), zero_point.view(qparams_shape)
    expected = numerics.quantize(w, s, z, -127, 127, torch.int8)
    assert torch.equal(numerics.quantize_weight(w, scale, zero_point, axis, -127, 127, torch.int8), expected)
    out = torch.empty(shape, dtype=torch.int8)
    strided = w.mT.contiguous().mT
    returned = numerics.quantize_weight(strided, scale, zero_point, axis, -127, 127, torch.int8, out=out)
    assert returned is out
    assert torch.equal(out, expected)


def allocations(profile: torch.autograd.profiler.profile) -> list[int]:
    """Bytes that each operator allocated; their order and their ends, which depend on the profiler, do not matter."""
    return [e.self_cpu_memory_usage for e in profile.function_events if e.self_cpu_memory_usage > 0]


def test_quantize_weight_keeps_its_temporaries_small() -> None:
    w = torch.randn(4096, 2048)  # 32 MiB
    scale, zero_point = torch.rand(4096) + 0.01, torch.zeros(4096, dtype=torch.int32)
    out = torch.empty(w.shape, dtype=torch.int8)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        numerics.quantize_weight(w, scale, zero_point, 0, -127, 127, torch.int8, out=out)
    assert max(allocations(profile)) == 4 * blocks.BLOCK  # a block of float32; two or three are alive at a time


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_eager_operators_make_no_temporary_larger_than_a_block(layout: str) -> None:
    """Codes and values are the only allocations of more than 1 MiB, whatever the layout; the input has 32."""
    x = torch.randn(4096, 2048) if layout == "contiguous" else torch.randn(2048, 4096).t()
    scales, zero_points = torch.rand(4096) + 0.01, torch.zeros(4096, dtype=torch.int32)
    tail = (scales, zero_points, 0, -127, 127, torch.int8)
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        codes = quantized_decomposed.quantize_per_channel(x, *tail)
        values = quantized_decomposed.dequantize_per_channel(codes, *tail)
    assert sorted(size for size in allocations(profile) if size > 2**20) == [codes.nbytes, values.nbytes]
    assert codes.stride() == values.stride() == x.stride()
