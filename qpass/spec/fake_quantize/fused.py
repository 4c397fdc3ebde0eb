"""torch.ao's name for the module that its training presets use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpass.errors import ConfigError
from qpass.spec.fake_quantize.observed import FakeQuantize
from qpass.spec.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver


class FusedMovingAvgObsFakeQuantize(FakeQuantize):
    """`FakeQuantize` of a moving average.

    Under ``torch.compile`` observing and rounding are fused with their neighbours, so it needs no operator of its own,
    and takes what `FakeQuantize` takes: every floating dtype, autocast.

    Raises:
        ConfigError: `observer` makes an observer of another kind.
    """

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = 0,
        quant_max: int | None = 255,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, is_dynamic, **observer_kwargs)
        kinds = MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver
        if not isinstance(self.activation_post_process, kinds):
            raise ConfigError(
                f"FusedMovingAvgObsFakeQuantize needs an observer of a moving average, not a "
                f"{type(self.activation_post_process).__name__}",
                hint="use FakeQuantize for other observers",
            )
