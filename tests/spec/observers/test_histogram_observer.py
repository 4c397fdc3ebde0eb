from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qpass.arithmetic import numerics
from qpass.observer import HistogramObserver, MinMaxObserver


def data(name: str) -> list[Tensor]:
    """Four batches of 5,000 values."""
    shape = (4, 5000)
    draws = {
        "gaussian": lambda: torch.randn(shape),
        "relu": lambda: torch.randn(shape).relu(),
        "gelu": lambda: nn.functional.gelu(torch.randn(shape) * 2),
        "heavy": lambda: torch.distributions.StudentT(3.0).sample(shape),
        "growing": lambda: torch.randn(shape) * torch.tensor([[0.01], [3.0], [9.0], [2.0]]),
        "outliers": lambda: torch.where(torch.rand(shape) < 0.01, 40.0, 1.0) * torch.randn(shape),
    }
    return list(draws[name]())


def squared_error(x: Tensor, scale: Tensor, zero_point: Tensor, low: int, high: int) -> float:
    codes = numerics.quantize(x, scale, zero_point, low, high, torch.int32)
    return float((numerics.dequantize(codes, scale, zero_point) - x).double().square().mean())


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "relu", "gelu", "heavy", "growing", "outliers"])
def test_the_range_of_least_error(name: str, symmetric: bool, bits: int) -> None:
    batches = data(name)
    x = torch.cat(batches)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    dtype = torch.int8 if symmetric else torch.uint8
    scheme = torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine
    observer = HistogramObserver(dtype=dtype, qscheme=scheme, quant_min=low, quant_max=high)
    full = MinMaxObserver(dtype=dtype, qscheme=scheme, quant_min=low, quant_max=high)
    for batch in batches:
        observer(batch)
        full(batch)
    found = squared_error(x, *observer.calculate_qparams(), low, high)
    tried = [squared_error(x, *full.calculate_qparams(), low, high)]
    for shrink in torch.linspace(0.05, 1, 24):
        for other in [shrink] if symmetric else torch.linspace(0.1, 1, 12):
            ends = x.min() * other, x.max() * shrink
            tried.append(squared_error(x, *numerics.choose_qparams(*ends, low, high, symmetric), low, high))
    assert found <= min(tried) * (
        1 + 1e-3
    )  # 1e-3: bins stand for the values in them; the full range is among the tries


def test_batches_in_any_order_make_the_histogram_of_their_union() -> None:
    batches = [torch.randn(5000) * 10.0**power + offset for power, offset in ((-3, 0), (2, 5), (0, -900), (-6, 0.25))]
    union = HistogramObserver()
    union(torch.cat(batches))
    assert union.histogram.sum() == 20_000
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        observer = HistogramObserver()
        for place in order:
            observer(batches[place])
        assert torch.equal(observer.histogram, union.histogram)
        assert (observer.min_val, observer.max_val) == (union.min_val, union.max_val)


def test_bins_are_exact() -> None:
    """Against counting by fractions of a power of two: 2048 bins of 2**-8 hold -3 .. 4 with one to spare."""
    x = torch.cat([torch.arange(-3 * 256, 4 * 256) / 256, torch.tensor([4.0])])
    x = torch.cat([x, torch.nextafter(x[1:-1], torch.tensor(-torch.inf))])
    observer = HistogramObserver()
    observer(x)
    width = 2.0**-8
    expected = torch.bincount(((x.double() / width).floor() + 3 * 256).long(), minlength=2048)
    assert torch.equal(observer.histogram, expected)


@pytest.mark.parametrize(
    "values", [[0.0], [3.0], [-3.0], [1e-45], [1.7e38, -1.7e38], [1e-30, 1e30], [1000.0, 1000.0001], [-1e-40, 65504.0]]
)
def test_odd_ranges(values: list[float]) -> None:
    x = torch.tensor(values)
    observer = HistogramObserver()
    observer(x)
    assert observer.histogram.sum() == len(values)
    scale, zero_point = observer.calculate_qparams()
    assert scale.isfinite().all()
    size = x.abs().max().clamp(1e-30)  # the smallest scale may be wider than smaller values
    error = squared_error(x / size, scale / size, zero_point, 0, 255)
    assert error <= (1 / 255) ** 2 * 1.01  # half a scale for values of -1 and 1, and 1 % for rounding


def test_layout_does_not_matter() -> None:
    x = torch.randn(2, 8, 5, 5)
    plain = HistogramObserver()
    plain(x)
    for other in (x.contiguous(memory_format=torch.channels_last), x.mT, x.flip(1)):
        observer = HistogramObserver()
        observer(other)
        assert torch.equal(observer.histogram, plain.histogram)
