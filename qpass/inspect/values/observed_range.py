"""What one observer saw, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ObservedRange:
    """What one observer saw.

    Attributes:
        low, high: the extremes; ``chosen``: the ends of the range that its qparams cover, per tensor the chosen one;
            of a fake-quantize module the smallest and the largest value that it rounds to.
        counts: how many values fell into equal parts of ``low .. high``, empty where the observer keeps no histogram.
        weight: whether it observes a constant, or one that a batch norm is folded into.
    """

    name: str
    module: str
    dtype: torch.dtype
    low: float
    high: float
    chosen: tuple[float, float]
    counts: tuple[int, ...] = ()
    weight: bool = False
