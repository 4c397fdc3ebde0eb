"""An observer and the rounding it asks for: the fake-quantize module that most models are trained with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass.fake_quantize.base import FakeQuantizeBase
from qpass.modes import in_backward
from qpass.observer.base import ObserverBase, is_eager
from qpass.observer.min_max import MovingAverageMinMaxObserver
from qpass.spec import QuantizationSpec


class FakeQuantize(FakeQuantizeBase):
    """In training: observe x, then round it by the range seen so far. In evaluation: round it by the last range.

    A batch that activation checkpointing computes again during the backward pass is not observed a second time, so it
    is rounded as it was the first time.

    Args:
        observer: an observer class, or a constructor of `with_args`.
        quant_min, quant_max: bounds of the codes; by default those of the observer's dtype.
        is_dynamic: choose the qparams from each tensor alone.
        observer_kwargs: what else the observer takes: ``dtype qscheme eps ch_axis averaging_constant``, ...

    Attributes:
        activation_post_process: the observer.
    """

    activation_post_process: ObserverBase

    def __init__(
        self,
        observer: Callable[..., ObserverBase] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__()
        if is_dynamic:
            observer_kwargs["is_dynamic"] = True
        self.activation_post_process = observer(quant_min=quant_min, quant_max=quant_max, **observer_kwargs)

    @property
    def spec(self) -> QuantizationSpec:
        return self.activation_post_process.spec

    @spec.setter
    def spec(self, spec: QuantizationSpec) -> None:
        self.activation_post_process.spec = spec

    @property
    def has_data(self) -> bool:
        return self.activation_post_process.has_data

    def forward(self, x: Tensor) -> Tensor:
        """x ``[...]`` -> x rounded, of the same shape and dtype."""
        if is_eager(x):  # the same values as below, without the work that a switch makes needless
            if self.training and self.observer_enabled[0] and not in_backward():
                self.observe(x)
            return self.rounded(x) if self.fake_quant_enabled[0] else x
        if self.training:
            before = [buffer.clone() for buffer in self._statistics()]
            self.observe(x)
            enabled = self.observer_enabled.bool()
            for buffer, old in zip(self._statistics(), before, strict=True):
                buffer.copy_(torch.where(enabled.reshape([1] * buffer.dim() or []), buffer, old))
        return self.rounded(x)

    def observe(self, x: Tensor) -> None:
        """Take x into the range, and the qparams from there."""
        self.activation_post_process(x.detach())
        scale, zero_point = self.activation_post_process.calculate_qparams()
        if self.scale.shape != scale.shape:
            self.scale.resize_(scale.shape)
            self.zero_point.resize_(scale.shape)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)

    def _statistics(self) -> list[Tensor]:
        return [self.scale, self.zero_point, *self.activation_post_process.buffers()]
