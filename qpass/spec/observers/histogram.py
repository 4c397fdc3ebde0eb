"""all values seen -> the range that loses least, by a histogram that grows in whole bins: no count is split or lost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic.numerics import EPS
from qpass.errors import ConfigError
from qpass.spec import PerTensor
from qpass.spec.observers.base import is_eager
from qpass.spec.observers.extrema import finite
from qpass.spec.observers.keywords import spec_from_keywords
from qpass.spec.observers.least_error import least_error_range
from qpass.spec.observers.min_max import RangeObserver
from qpass.spec.observers.over_ranks import sum_over_ranks

CHUNK = 1 << 15
"""Values counted at once: their bin numbers stay in cache, which makes it several times as fast as ``torch.histc``."""

MIN_EXPONENT = -120


class HistogramObserver(RangeObserver):
    """Counts values in bins, and quantizes the range whose mean squared quantization error is least.

    Bins are ``2**k`` wide and start at multiples of that. `k` is the least that lets `bins` of them cover the range
    seen, with room for one; it follows from `min_val` and `max_val` alone and never falls. So when the range grows,
    an old bin lies inside one new bin, and its count moves there whole: the histogram of two batches is that of their
    union, whatever their order.

    Absurd values (see `outliers.ABSURD`) are left out, counts and range, and the report names the worst. All are kept
    under a trace, or where several processes count together.

    Attributes:
        histogram: int64 ``[bins]``, counts of the finite values seen.
    """

    histogram: Tensor
    leaves_outliers_out = True

    def __init__(
        self,
        bins: int = 2048,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = EPS,
        is_dynamic: bool = False,
    ) -> None:
        spec = spec_from_keywords(dtype, qscheme, PerTensor(), quant_min, quant_max, eps, is_dynamic, reduce_range)
        super().__init__(spec)
        if bins < 2:
            raise ConfigError(f"HistogramObserver needs at least 2 bins, not {bins}")
        self.bins = bins
        self.register_buffer("histogram", torch.zeros(bins, dtype=torch.int64))
        if factory_kwargs and factory_kwargs.get("device") is not None:
            self.to(factory_kwargs["device"])

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low, high, left_out = self.agreed_extrema(x)
        if is_eager(x) and self.process_group is None:
            limit = self.outliers.limit(x, float(low), float(high))
            if limit < torch.inf:
                x = x[~(x.abs() > limit) | x.isinf()]
                low, high, left_out = self.agreed_extrema(x)
        new_min, new_max = self.combine(low, high)
        unchanged = is_eager(x) and bool((new_min == self.min_val) & (new_max == self.max_val))
        if not unchanged:
            old_range = self.seen_range()
            self.min_val.copy_(new_min)
            self.max_val.copy_(new_max)
            self.histogram.copy_(self._moved(old_range))
        counts = self._count(x, left_out) if is_eager(x) else self._count_masked(x)
        self.histogram.add_(counts if self.process_group is None else sum_over_ranks(counts, self.process_group))
        return left_out, low <= high

    def seen_range(self) -> tuple[Tensor, Tensor]:
        """All that was seen, before any of it is given up."""
        return super().chosen_range()

    def chosen_range(self) -> tuple[Tensor, Tensor]:
        """The ends of the range of least error."""
        low, high = self.seen_range()
        return least_error_range(
            self.histogram, self.edges(), low, high, *self.spec.range, self.spec.symmetric, self.eps
        )

    def edges(self) -> Tensor:
        """The edges of the bins: float64 ``[bins + 1]``, exact."""
        low, high = self.seen_range()
        exponent = self._exponent(low, high)
        width = _power_of_two(exponent).to(torch.float64)
        return (_first_bin(low, exponent) + torch.arange(self.bins + 1, device=low.device)) * width

    def reset(self) -> None:
        super().reset()
        self.histogram.zero_()

    def _exponent(self, low: Tensor, high: Tensor) -> Tensor:
        """``k``: there are at most `bins` bins of ``2**k`` from `low` to `high`, and ``2**40`` from zero to either."""
        spread = (high.to(torch.float64) - low) / (self.bins - 1)
        by_spread = torch.where(spread > 0, torch.frexp(spread).exponent, MIN_EXPONENT)
        by_size = torch.frexp(torch.maximum(low.abs(), high.abs())).exponent - 40
        return torch.maximum(by_spread, by_size).clamp(min=MIN_EXPONENT)

    def _moved(self, old_range: tuple[Tensor, Tensor]) -> Tensor:
        """The counts so far, in bins for the range as it is now."""
        low, high = self.seen_range()
        old_exponent, exponent = self._exponent(*old_range), self._exponent(low, high)
        index = _first_bin(old_range[0], old_exponent) + torch.arange(self.bins, device=low.device)
        index = index >> (exponent - old_exponent).clamp(0, 62)
        index = (index - _first_bin(low, exponent)).clamp(0, self.bins - 1)
        return torch.zeros_like(self.histogram).index_add_(0, index, self.histogram)

    def _scale_and_first_bin(self) -> tuple[Tensor, Tensor]:
        """One over the width of a bin, and the number of bins between zero and the first: exact float32 scalars."""
        low, high = self.seen_range()
        exponent = self._exponent(low, high)
        return _power_of_two(-exponent), _first_bin(low, exponent).to(torch.float32)

    def _count(self, x: Tensor, left_out: Tensor) -> Tensor:
        scale, first = (float(number) for number in self._scale_and_first_bin())
        counts = torch.zeros_like(self.histogram)
        for chunk in (_flat(x) if left_out == 0 else x[finite(x)]).split(CHUNK):
            index = _bin_of(chunk, scale, first, self.bins).to(torch.int32)
            counts.add_(torch.bincount(index, minlength=self.bins))
        return counts

    def _count_masked(self, x: Tensor) -> Tensor:
        """Counts under a trace, where values that are not finite cannot be dropped: they go to a bin too many."""
        values = x.reshape(-1)
        index = _bin_of(values, *self._scale_and_first_bin(), self.bins)
        index = torch.where(finite(values), index, float(self.bins)).to(torch.int64)
        counts = torch.zeros(self.bins + 1, dtype=torch.int64, device=x.device)
        return counts.index_add_(0, index, torch.ones_like(index))[: self.bins]


def _bin_of(x: Tensor, scale: Tensor | float, first: Tensor | float, bins: int) -> Tensor:
    """The bin of each value, as float32. Exact: powers of two do not round, nor do differences of near integers."""
    return (x.to(torch.float32) * scale).floor_().sub_(first).clamp_(0, bins - 1)


def _power_of_two(exponent: Tensor) -> Tensor:
    """``2.0**exponent`` as float32, exact for -126..127: the exponent goes straight into the bits."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _first_bin(low: Tensor, exponent: Tensor) -> Tensor:
    """The number of bins of ``2**exponent`` between zero and the bin that holds `low` (int64)."""
    return torch.floor(low.to(torch.float64) * _power_of_two(-exponent)).to(torch.int64)


def _flat(x: Tensor) -> Tensor:
    """All values of `x` in any order, without a copy where its memory has no gaps (channels_last, say)."""
    order = sorted(range(x.dim()), key=lambda dim: x.stride(dim), reverse=True)
    return x.permute(order).reshape(-1)
