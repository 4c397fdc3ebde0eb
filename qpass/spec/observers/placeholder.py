"""nothing recorded: observers that stand where a scale is found at run time, or where none is wanted."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from qpass.arithmetic.numerics import RANGES
from qpass.errors import CalibrationError
from qpass.spec import PerTensor
from qpass.spec.observers.base import ObserverBase
from qpass.spec.observers.keywords import STORAGE, spec_from_keywords
from qpass.spec.observers.statistics import StatisticsObserver


class UnquantizedObserver(ObserverBase):
    """Hands every tensor on, and has no qparams.

    Attributes:
        dtype: as given; it need not be one of codes. `spec` then describes uint8, and nobody asks for it.
        custom_op: as given, for whoever reads it.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        custom_op_name: str = "",
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        is_code = STORAGE.get(dtype, dtype) in RANGES
        scheme = torch.per_tensor_affine if qscheme is None else qscheme
        bounds = (quant_min, quant_max) if is_code else (None, None)
        spec = spec_from_keywords(dtype if is_code else torch.uint8, scheme, PerTensor(), *bounds, eps, is_dynamic)
        super().__init__(spec)
        self._dtype = None if is_code else dtype
        self.custom_op = custom_op_name

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype or super().dtype

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself."""
        return x

    def choose_qparams(self) -> NoReturn:
        """There are none.

        Raises:
            CalibrationError: always.
        """
        raise CalibrationError(
            f"{type(self).__name__} has no qparams: they are chosen from each tensor at run time",
            hint="put a choose_qparams operator into the graph instead",
        )


class PlaceholderObserver(UnquantizedObserver, StatisticsObserver):
    """Marks a tensor that is quantized dynamically, and counts the tensors that come by: `has_data` says if any did.

    Keywords as torch.ao's observer of that name; `compute_dtype`, where given, means ``is_dynamic=True``.
    """

    def __init__(
        self,
        dtype: torch.dtype = torch.float32,
        custom_op_name: str = "",
        compute_dtype: torch.dtype | None = None,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        eps: float | None = None,
        is_dynamic: bool = False,
    ) -> None:
        dynamic = is_dynamic or compute_dtype is not None
        super().__init__(dtype, custom_op_name, quant_min, quant_max, qscheme, eps, dynamic)

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself, counted."""
        return StatisticsObserver.forward(self, x)

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.nonfinite), torch.ones_like(self.batches, dtype=torch.bool)


class NoopObserver(UnquantizedObserver):
    """Marks a tensor that stays floating: float16, say."""

    def __init__(self, dtype: torch.dtype = torch.float16, custom_op_name: str = "") -> None:
        super().__init__(dtype, custom_op_name)


class ReuseInputObserver(UnquantizedObserver):
    """Marks the result of an operator that only moves values: it shares the observer of the operator's input."""

    def __init__(self) -> None:
        super().__init__(torch.quint8)


class RecordingObserver(UnquantizedObserver):
    """Keeps a copy of every tensor, to be looked at.

    Attributes:
        tensor_val: the tensors, oldest first.
    """

    def __init__(self, dtype: torch.dtype = torch.quint8, **keywords: Any) -> None:
        super().__init__(dtype, **keywords)
        self.tensor_val: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself, after a copy of it was kept."""
        self.tensor_val.append(x.detach().clone())
        return x

    def get_tensor_value(self) -> list[Tensor]:
        return self.tensor_val

    def reset(self) -> None:
        self.tensor_val.clear()
