"""a scale that is trained: learned step size quantization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import CalibrationError, ConfigError
from qpass.spec.fake_quantize.observed import FakeQuantize
from qpass.spec.fake_quantize.rounding import aligned, decoded, grouped, straight_through
from qpass.spec.observers import MovingAverageMinMaxObserver
from qpass.spec.observers.base import is_eager


class LearnableFakeQuantize(FakeQuantize):
    """Rounds by a scale that is a parameter, trained with the weights (Esser et al. 2020, https://arxiv.org/abs/1902.08153).

    With ``u = round(x / s) + z`` and ``code = clamp(u, quant_min, quant_max)`` the gradient of the scale is

        d value / d s = (u - z - x / s) * g where u was not clamped, (code - z) * g elsewhere
        g = 1 / sqrt(N * Q)

    with ``N`` the values that share the scale and ``Q`` the positive codes: ``quant_max`` minus the middle of the codes
    for a symmetric spec, ``quant_max - quant_min`` for an affine one. The zero point is not trained. (The paper asks
    whether ``x / s`` itself lies within the codes, which differs in the last half step at either end.)

    The first tensor seen in training sets scale and zero point as its observer says, and with that the observer
    switches itself off; ``enable_observer`` lets the next tensor set them again. Where the optimizer takes the scale
    below the spec's `eps`, `eps` is what is rounded by, and the gradient still reaches the scale.

    Args:
        channel_len: number of scales, so that the parameter has its shape before an optimizer is made. -1: found from
            the first tensor, which a compiled or exported module must have seen before.
        use_grad_scaling: False: ``g = 1``.
    """

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        channel_len: int = -1,
        use_grad_scaling: bool = True,
        **observer_kwargs: Any,
    ) -> None:
        super().__init__(observer, quant_min, quant_max, is_dynamic, **observer_kwargs)
        if self.is_dynamic:
            raise ConfigError("LearnableFakeQuantize cannot be dynamic: its scale is trained")
        self.use_grad_scaling = use_grad_scaling
        if channel_len != -1:
            self._fit([channel_len])

    def _register_qparams(self) -> None:
        super()._register_qparams()
        del self.scale
        self.scale = nn.Parameter(torch.ones(1))

    def observe(self, x: Tensor) -> None:
        super().observe(x)
        seen = self.activation_post_process.seen().to(torch.uint8)
        self.observer_enabled.mul_(1 - seen)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let the next tensor set scale and zero point, or do not."""
        super().enable_observer(enabled)
        if enabled:
            self.activation_post_process.reset()

    def choose_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale.detach().clamp(min=self.eps), self.zero_point

    def round(self, x: Tensor, on: Tensor | None) -> Tensor:
        spec, whole = self.spec, grouped(x, self.spec)
        positive = straight_through(self.scale.clone(), self.scale.detach().clamp(min=self.eps))
        scale, zero_point = aligned(x, positive, spec), aligned(x, self.zero_point, spec)
        value, inside, unclamped = decoded(whole, scale, zero_point, spec)
        level = unclamped.clamp(*spec.range).nan_to_num(nan=spec.range[0]) - zero_point
        slope = torch.where(
            inside, level - whole.detach().to(level.dtype) / scale.detach(), level
        ) * self._gradient_scale(x)
        if on is not None:
            value, inside = torch.where(on, value, whole.detach()), inside | ~on
            slope = torch.where(on, slope, 0)
        y = torch.where(inside, whole, 0) + (slope * scale).to(x.dtype)
        return straight_through(y, value).reshape(x.shape)

    def _gradient_scale(self, x: Tensor) -> Tensor | float:
        if not self.use_grad_scaling:
            return 1.0
        low, high = self.spec.range
        positive = high - (low + high + 1) // 2 if self.spec.symmetric else high - low
        sharing = x.numel() / self.scale.numel()
        return self.zero_point.new_full((), sharing * positive, dtype=torch.float32).clamp(min=1).rsqrt()

    def _fit(self, shape: Sequence[int]) -> None:
        if self.scale.shape == torch.Size(shape):
            return
        if not is_eager(self.scale):
            raise CalibrationError(
                "LearnableFakeQuantize cannot find the number of its scales inside a graph",
                hint="call the module once before it is compiled or exported, or give it channel_len",
            )
        self.scale.data = self.scale.data.new_ones(shape)  # the same parameter, which an optimizer may hold
        self.zero_point.resize_(shape).zero_()
