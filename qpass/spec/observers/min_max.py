"""min and max seen -> qparams: per tensor, per channel, per group; over all batches, or as a moving average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic.numerics import EPS, choose_qparams
from qpass.errors import CalibrationError, ConfigError
from qpass.spec import PerChannel, PerGroup, PerTensor, QuantizationSpec
from qpass.spec.observers.base import is_eager
from qpass.spec.observers.extrema import extrema
from qpass.spec.observers.keywords import spec_from_keywords
from qpass.spec.observers.outliers import OutlierWatch
from qpass.spec.observers.over_ranks import extrema_over_ranks
from qpass.spec.observers.statistics import StatisticsObserver


class RangeObserver(StatisticsObserver):
    """Keeps a minimum and a maximum for each scale: float32 buffers `min_val` and `max_val`, +inf and -inf before data.

    Both are scalars per tensor; otherwise they take their shape from the first tensor, and are empty before it.

    Attributes:
        outliers: the absurd values seen per tensor, which the report names; they are part of the range.
    """

    leaves_outliers_out = False

    min_val: Tensor
    max_val: Tensor
    float_qparams = False

    def __init__(self, spec: QuantizationSpec, factory_kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(spec)
        shape = () if isinstance(spec.granularity, PerTensor) else (0,)
        self.register_buffer("min_val", torch.full(shape, torch.inf))
        self.register_buffer("max_val", torch.full(shape, -torch.inf))
        self.outliers = OutlierWatch()
        if factory_kwargs and factory_kwargs.get("device") is not None:
            self.to(factory_kwargs["device"])

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.take_shape(x)
        low, high, left_out = self.agreed_extrema(x)
        if low.dim() == 0 and is_eager(x):
            self.outliers.limit(x, float(low), float(high))
        new_min, new_max = self.combine(low, high)
        self.min_val.copy_(new_min)
        self.max_val.copy_(new_max)
        return left_out, (low <= high).any()

    def agreed_extrema(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`extrema` of one tensor, together with those of the other processes of the group if there is one."""
        found = self.extrema(x)
        return found if self.process_group is None else extrema_over_ranks(*found, self.process_group)

    def extrema(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`extrema` of one tensor, shaped like the scales."""
        return extrema(x)

    def combine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range so far together with that of one more tensor."""
        return torch.minimum(self.min_val, low), torch.maximum(self.max_val, high)

    def choose_qparams(self) -> tuple[Tensor, Tensor]:
        low, high = self.chosen_range()
        scale, zero_point = choose_qparams(low, high, *self.spec.range, self.spec.symmetric, self.eps)
        if self.float_qparams:
            scale, zero_point = float_qparams(low, high, *self.spec.range, self.eps)
        scale = torch.where(self.min_val <= self.max_val, scale, 1.0)
        if scale.dim() == 0:
            return scale.reshape(1), zero_point.reshape(1)
        return scale, zero_point

    def chosen_range(self) -> tuple[Tensor, Tensor]:
        """The ends of the range to quantize; 0 and 0 where nothing was seen."""
        seen = self.min_val <= self.max_val
        return torch.where(seen, self.min_val, 0.0), torch.where(seen, self.max_val, 0.0)

    def reset(self) -> None:
        super().reset()
        self.outliers = OutlierWatch()
        self.min_val.fill_(torch.inf)
        self.max_val.fill_(-torch.inf)

    def take_shape(self, x: Tensor) -> None:
        shape = self.range_shape(x)
        if self.min_val.shape == shape:
            return
        if self.min_val.numel() > 0:
            raise CalibrationError(
                f"{type(self).__name__} has ranges of shape {tuple(self.min_val.shape)}, "
                f"but this tensor has {tuple(shape)} of them",
                hint="observe one tensor with one observer, or reset() it before another",
            )
        if is_eager(x):
            self.min_val.resize_(shape).fill_(torch.inf)
            self.max_val.resize_(shape).fill_(-torch.inf)
        else:  # a graph may not resize a tensor it was given
            self.min_val = torch.full(shape, torch.inf, device=self.min_val.device)
            self.max_val = torch.full(shape, -torch.inf, device=self.max_val.device)

    def range_shape(self, x: Tensor) -> tuple[int, ...]:
        """The shape of the ranges of `x`."""
        return ()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Ranges take the shape that they were saved with, and what torch's observers save is understood.

        There `eps` is a buffer, and nothing was counted.
        """
        state_dict.pop(prefix + "eps", None)
        names = [prefix + name for name in ("min_val", "max_val")]
        if all(name in state_dict for name in names):
            low, high = (state_dict[name] for name in names)
            faults = list(self._range_faults(names, low, high))
            if faults:
                error_msgs += faults
                return
            if not isinstance(self.spec.granularity, PerTensor):
                self.min_val.resize_(low.shape)
                self.max_val.resize_(low.shape)
            state_dict.setdefault(prefix + "batches", (low <= high).any().to(torch.int64))
            state_dict.setdefault(prefix + "nonfinite", torch.zeros((), dtype=torch.int64))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _range_faults(self, names: list[str], low: Tensor, high: Tensor) -> Iterator[str]:
        settled = isinstance(self.spec.granularity, PerTensor) or self.min_val.numel() > 0
        for name, value in zip(names, (low, high), strict=True):
            if value.shape != low.shape or (settled and value.shape != self.min_val.shape):
                yield f"{name} has shape {tuple(value.shape)}, but this observer has {tuple(self.min_val.shape)}."
            elif not value.is_meta and value.isnan().any():
                yield f"{name} is NaN."


class MinMaxObserver(RangeObserver):
    """The smallest and the largest value of all batches. Keywords as torch.ao's observer of that name."""

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_tensor_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = EPS,
        is_dynamic: bool = False,
    ) -> None:
        spec = spec_from_keywords(dtype, qscheme, PerTensor(), quant_min, quant_max, eps, is_dynamic, reduce_range)
        super().__init__(spec, factory_kwargs)


class PerChannelMinMaxObserver(RangeObserver):
    """The smallest and the largest value of each index of dimension `ch_axis`, over all batches."""

    def __init__(
        self,
        ch_axis: int = 0,
        dtype: torch.dtype = torch.uint8,
        qscheme: torch.qscheme = torch.per_channel_affine,
        reduce_range: bool = False,
        quant_min: int | None = None,
        quant_max: int | None = None,
        factory_kwargs: dict[str, Any] | None = None,
        eps: float = EPS,
        is_dynamic: bool = False,
    ) -> None:
        kind = PerChannel(ch_axis)
        spec = spec_from_keywords(dtype, qscheme, kind, quant_min, quant_max, eps, is_dynamic, reduce_range)
        super().__init__(spec, factory_kwargs)
        self.ch_axis = ch_axis
        self.float_qparams = qscheme == torch.per_channel_affine_float_qparams

    @property
    def qscheme(self) -> torch.qscheme:
        return torch.per_channel_affine_float_qparams if self.float_qparams else super().qscheme

    def range_shape(self, x: Tensor) -> tuple[int, ...]:
        if not -x.dim() <= self.ch_axis < x.dim():
            raise ConfigError(
                f"{type(self).__name__} has ch_axis {self.ch_axis}, but the tensor has {x.dim()} dimensions",
                hint="choose the axis of the weight's output channels",
            )
        return (x.shape[self.ch_axis],)

    def extrema(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return extrema(x, [dim for dim in range(x.dim()) if dim != self.ch_axis % x.dim()])


class PerGroupMinMaxObserver(RangeObserver):
    """The smallest and the largest value of each `group_size` neighbours in the last dimension, over all batches.

    A tensor ``[..., K]`` has ranges and scales ``[..., K / group_size]``.
    """

    def __init__(
        self,
        group_size: int = 128,
        dtype: torch.dtype = torch.int8,
        qscheme: torch.qscheme = torch.per_channel_symmetric,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float = EPS,
    ) -> None:
        super().__init__(spec_from_keywords(dtype, qscheme, PerGroup(group_size), quant_min, quant_max, eps))
        self.group_size = group_size

    def range_shape(self, x: Tensor) -> tuple[int, ...]:
        if x.dim() == 0 or x.shape[-1] % self.group_size != 0:
            raise ConfigError(
                f"group_size {self.group_size} does not divide the last dimension of shape {tuple(x.shape)}",
                hint="choose a group size that divides it, or PerChannel",
            )
        return (*x.shape[:-1], x.shape[-1] // self.group_size)

    def extrema(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return extrema(x.unflatten(-1, (-1, self.group_size)), [-1])


class _MovingAverage(RangeObserver):
    """``range += averaging_constant * (range of this batch - range)``, from the first batch's range on."""

    averaging_constant: float

    def combine(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        return self._average(self.min_val, low), self._average(self.max_val, high)

    def _average(self, old: Tensor, new: Tensor) -> Tensor:
        averaged = old + self.averaging_constant * (new - old)
        return torch.where(new.isinf(), old, torch.where(old.isinf(), new, averaged))


class MovingAverageMinMaxObserver(_MovingAverage, MinMaxObserver):
    """A moving average over batches of their smallest and largest values."""

    def __init__(self, averaging_constant: float = 0.01, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.averaging_constant = averaging_constant


class MovingAveragePerChannelMinMaxObserver(_MovingAverage, PerChannelMinMaxObserver):
    """A moving average over batches of the smallest and largest values of each index of dimension `ch_axis`."""

    def __init__(self, averaging_constant: float = 0.01, ch_axis: int = 0, *arguments: Any, **keywords: Any) -> None:
        super().__init__(ch_axis, *arguments, **keywords)
        self.averaging_constant = averaging_constant


def float_qparams(low: Tensor, high: Tensor, quant_min: int, quant_max: int, eps: float) -> tuple[Tensor, Tensor]:
    """Scale and a zero point that is not rounded, both float32: the range is spread exactly, and need not hold zero.

    The formulas are those of torch.ao for ``torch.per_channel_affine_float_qparams``, the scheme of its embeddings.
    """
    scale = (high - low) / float(quant_max - quant_min)
    scale = torch.where(scale > eps, scale, 1.0)
    return scale, -low / scale
