"""x -> dequantize(quantize(x)), with a gradient: modules that round while a model is trained."""

from __future__ import annotations

from qpass.fake_quantize.base import (
    FakeQuantizeBase,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
)
from qpass.fake_quantize.observed import FakeQuantize
from qpass.fake_quantize.rounding import fake_quantize
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
    "fake_quantize",
    "freeze_batch_norm_stats",
    "freeze_observers",
    "update_batch_norm_stats",
    "update_observers",
]
