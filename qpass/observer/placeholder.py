"""nothing recorded, data counted: stands where a scale will be found at run time."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.errors import CalibrationError
from qpass.numerics import EPS
from qpass.observer.base import spec_from_keywords
from qpass.observer.statistics import StatisticsObserver
from qpass.spec import PerTensor


class PlaceholderObserver(StatisticsObserver):
    """Marks a tensor that is quantized dynamically, and counts the tensors that come by: `has_data` says if any did."""

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = EPS,
        is_dynamic: bool = True,
    ) -> None:
        super().__init__(spec_from_keywords(dtype, qscheme, PerTensor(), quant_min, quant_max, eps, is_dynamic))

    def observe(self, x: Tensor) -> Tensor:
        return torch.zeros_like(self.nonfinite)

    def choose_qparams(self) -> tuple[Tensor, Tensor]:
        raise CalibrationError(
            "PlaceholderObserver has no qparams: they are chosen from each tensor at run time.",
            hint="put a choose_qparams operator into the graph instead",
        )
