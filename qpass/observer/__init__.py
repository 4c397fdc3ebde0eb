"""tensors in, qparams out: modules that watch a tensor, hand it on untouched, and choose its scale and zero point."""

from __future__ import annotations

from qpass.observer.base import ObserverBase
from qpass.observer.histogram import HistogramObserver
from qpass.observer.min_max import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
)
from qpass.observer.placeholder import PlaceholderObserver
from qpass.observer.statistics import StatisticsObserver

__all__ = [
    "HistogramObserver",
    "MinMaxObserver",
    "MovingAverageMinMaxObserver",
    "MovingAveragePerChannelMinMaxObserver",
    "ObserverBase",
    "PerChannelMinMaxObserver",
    "PerGroupMinMaxObserver",
    "PlaceholderObserver",
    "StatisticsObserver",
]
