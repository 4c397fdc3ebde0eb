"""all values seen -> the range that holds most of them: a few outliers do not decide the scale of all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.errors import ConfigError
from qpass.spec.observers.histogram import HistogramObserver


class PercentileObserver(HistogramObserver):
    """Quantizes a range that holds `percentile` percent of the values, by the histogram of `HistogramObserver`.

    Symmetric specs: the magnitude that so many values do not exceed. Affine ones: the rest is cut off in equal parts
    at both ends. A range ends in the middle of no bin by more than the bin's width, 1/2048 to 1/1024 of all that was
    seen: inside a bin the values are taken as evenly spread.

    Args:
        percentile: above 50, at most 100, which is the full range.
        keywords: those of `HistogramObserver`.
    """

    def __init__(self, percentile: float = 99.99, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        if not 50 < percentile <= 100:
            raise ConfigError(
                f"PercentileObserver percentile must lie above 50 and not above 100, not {percentile!r}",
                hint="99.99 leaves out one value in ten thousand",
            )
        self.percentile = percentile

    def chosen_range(self) -> tuple[Tensor, Tensor]:
        low, high = self.seen_range()
        edges = self.edges()
        cut = 1 - self.percentile / 100
        counts = self.histogram.to(torch.float64)
        if not self.spec.symmetric:
            ends = _quantile(edges, counts, cut / 2), _quantile(edges, counts, 1 - cut / 2)
            return ends[0].clamp(min=low.double()).float(), ends[1].clamp(max=high.double()).float()
        magnitudes = torch.minimum(edges[:-1].abs(), edges[1:].abs())  # no bin spans zero: edges are multiples of one
        order = magnitudes.argsort(stable=True)
        width = edges[1] - edges[0]
        below = counts[order].cumsum(0)
        index = torch.searchsorted(below, below[-1] * (1 - cut)).clamp(max=self.bins - 1)
        inside = counts[order][index]
        share = ((below[-1] * (1 - cut) - (below[index] - inside)) / inside.clamp(min=1)).clamp(0, 1)
        magnitude = (magnitudes[order][index] + share * width).float()
        return torch.maximum(-magnitude, low), torch.minimum(magnitude, high)


def _quantile(edges: Tensor, counts: Tensor, share: float) -> Tensor:
    """The value below which that share of the counts lies (float64 scalar)."""
    below = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    wanted = below[-1] * share
    index = (torch.searchsorted(below, wanted, right=True) - 1).clamp(0, len(counts) - 1)
    inside = ((wanted - below[index]) / counts[index].clamp(min=1)).clamp(0, 1)
    return edges[index] + inside * (edges[index + 1] - edges[index])
