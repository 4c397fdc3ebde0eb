"""tensors in, the values their codes stand for out: modules that train a network for the rounding it will meet."""

from __future__ import annotations

from qpass.fake_quantize.base import (
    FakeQuantizeBase,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from qpass.fake_quantize.observed import FakeQuantize
from qpass.fake_quantize.schedule import (
    freeze_batch_norm_stats,
    freeze_observers,
    update_batch_norm_stats,
    update_observers,
)

__all__ = [
    "FakeQuantize",
    "FakeQuantizeBase",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "freeze_batch_norm_stats",
    "freeze_observers",
    "update_batch_norm_stats",
    "update_observers",
]
