"""qparams known beforehand: only the rounding is left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpass.errors import ConfigError
from qpass.spec.fake_quantize.observed import FakeQuantize
from qpass.spec.observers import FixedQParamsObserver


class FixedQParamsFakeQuantize(FakeQuantize):
    """Rounds by the scale and the zero point of a `FixedQParamsObserver`, in training and in evaluation.

    Raises:
        ConfigError: `observer` makes another observer.
    """

    def __init__(self, observer: Callable[..., Any]) -> None:
        super().__init__(observer=observer)
        if type(self.activation_post_process) is not FixedQParamsObserver:
            raise ConfigError(
                f"FixedQParamsFakeQuantize needs a FixedQParamsObserver, not a "
                f"{type(self.activation_post_process).__name__}"
            )
        self._take(*self.activation_post_process.choose_qparams(), None)

    def reset(self) -> None:
        super().reset()
        self._take(*self.activation_post_process.choose_qparams(), None)
