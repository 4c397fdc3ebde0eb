"""Absurd values: a mask's filling, garbage in padding, 1e30 among values of about one."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ABSURD = ((1e4, 0.999), (2.0**24, 0.95))
"""(factor, share): a value is absurd that is larger in magnitude than the factor times that quantile of the magnitudes
that are not zero, by either pair.

In eight bits over a range that reaches ``1e4`` times the 99.9th percentile, 99.9 % of the values are rounded to zero: a
step is 39 times as large as they are. The largest activations of language models, some 1e4 times the median (Sun et
al., Massive Activations in Large Language Models, arXiv:2402.17762), are kept, for that percentile lies far above the
median. One absurd value spoils a whole row of the next layer, of which there may be more than one value in a thousand:
those are told by ``2**24``, beyond which a float32 sum keeps no bit of the others."""
FEWEST = 100
"""Of fewer values none is called absurd."""
SAMPLE = 1 << 11
"""About as many values, equally spaced, stand for all: two of them lie above the 99.9th percentile, and factors of 1e4
do not depend on which."""


def limit_of(x: Tensor) -> float:
    """The magnitude beyond which values of `x` are absurd; infinity where there are too few to tell."""
    step = max(1, x.numel() // SAMPLE) | 1  # odd: rows are often a power of two long
    chosen = torch.arange(0, x.numel(), step, device=x.device)
    magnitudes = x[torch.unravel_index(chosen, x.shape)].abs() if x.dim() else x.new_empty(0)
    magnitudes = magnitudes[magnitudes.isfinite() & (magnitudes > 0)].to(torch.float32)
    count = magnitudes.numel()
    if count < FEWEST:
        return math.inf
    return min(factor * float(magnitudes.kthvalue(int(share * count)).values) for factor, share in ABSURD)


class OutlierWatch:
    """What one observer has seen of absurd values; plain numbers, so that a copy of a module keeps them.

    Attributes:
        worst: the absurd value of the largest magnitude; 0 where there was none.
        beyond: the magnitude from which values of that tensor are absurd.
    """

    worst = 0.0
    beyond = 0.0

    def __init__(self) -> None:
        self._usual = 0.0

    def limit(self, x: Tensor, low: float, high: float) -> float:
        """The magnitude beyond which values of `x`, whose finite ends these are, are absurd; infinity if none is.

        The quantiles are computed only for a tensor whose values are ten times as large as those of any tensor before.
        """
        largest = max(abs(low), abs(high))
        if not math.isfinite(largest) or largest <= 10 * self._usual:
            return math.inf
        limit = limit_of(x)
        if largest <= limit:
            self._usual = largest
            return math.inf
        if largest > abs(self.worst):
            self.worst, self.beyond = (low if abs(low) >= abs(high) else high), limit
        return limit

    def note(self, left_out: bool) -> str:
        """What there is to report, or ""."""
        if not self.worst:
            return ""
        fate = "is left out of the range" if left_out else "sets the range"
        return (
            f"calibration saw the value {self.worst:.3g}, far beyond all others (those beyond {self.beyond:.2g} are): "
            f"it {fate}"
        )
