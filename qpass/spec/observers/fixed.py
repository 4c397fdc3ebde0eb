"""qparams known beforehand: nothing is observed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qpass.errors import ConfigError
from qpass.spec import PerTensor
from qpass.spec.observers.base import ObserverBase
from qpass.spec.observers.keywords import spec_from_keywords


class FixedQParamsObserver(ObserverBase):
    """Answers with the scale and the zero point it was made with: for a sigmoid, say, whose range is known.

    Args:
        scale: positive and finite.
        zero_point: within ``quant_min..quant_max``.

    Raises:
        ConfigError: `scale` or `zero_point` is none, or the observer is to be dynamic.

    Attributes:
        scale: float32 ``[1]``; zero_point: int32 ``[1]``.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        scale: float,
        zero_point: int,
        dtype: torch.dtype = torch.quint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int = 0,
        quant_max: int = 255,
        is_dynamic: bool = False,
        **keywords: Any,
    ) -> None:
        if is_dynamic:
            raise ConfigError("FixedQParamsObserver cannot be dynamic: its qparams are fixed")
        spec = spec_from_keywords(dtype, qscheme, PerTensor(), quant_min, quant_max, keywords.pop("eps", None))
        if keywords:
            raise ConfigError(f"FixedQParamsObserver does not take {', '.join(keywords)}")
        if not (math.isfinite(scale) and scale > 0):
            raise ConfigError(f"FixedQParamsObserver scale must be positive and finite, not {scale!r}")
        if not quant_min <= zero_point <= quant_max:
            raise ConfigError(f"FixedQParamsObserver zero_point {zero_point!r} is not within {quant_min}..{quant_max}")
        super().__init__(spec)
        self._fixed = float(scale), int(zero_point)
        self.register_buffer("scale", torch.tensor([scale], dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor([zero_point], dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def choose_qparams(self) -> tuple[Tensor, Tensor]:
        return self.scale, self.zero_point

    def reset(self) -> None:
        self.scale.fill_(self._fixed[0])
        self.zero_point.fill_(self._fixed[1])
