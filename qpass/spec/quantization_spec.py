"""dtype, granularity, scheme -> how one tensor is quantized: a value that compares, hashes and refuses nonsense."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from qpass.arithmetic.numerics import EPS, FLOAT8_RANGES, RANGES, dtype_name
from qpass.errors import ConfigError, near


@dataclass(frozen=True)
class PerTensor:
    """One scale and one zero point for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale and one zero point for each index of dimension `axis`; a negative axis counts from the end."""

    axis: int

    def __post_init__(self) -> None:
        if not _is_int(self.axis):
            raise ConfigError(f"PerChannel axis must be an int, not {self.axis!r}")


@dataclass(frozen=True)
class PerGroup:
    """One scale and one zero point for each run of `group_size` neighbours in the last dimension."""

    group_size: int

    def __post_init__(self) -> None:
        if not _is_int(self.group_size) or self.group_size <= 0:
            raise ConfigError(
                f"PerGroup group_size must be a positive int, not {self.group_size!r}",
                hint="choose a size that divides the last dimension of the weight, such as 32, 64 or 128",
            )


@dataclass(frozen=True)
class PerToken:
    """One scale and one zero point for each row: each index of all dimensions but the last. Always dynamic."""


Granularity = PerTensor | PerChannel | PerGroup | PerToken


@dataclass(frozen=True)
class QuantizationSpec:
    """How one tensor is quantized.

    Args:
        dtype: storage dtype of the codes: int8, uint8, int16, uint16 or int32. A sub-byte range such as -8..7 is
            carried in int8. Not an 8-bit float: torch's q/dq operators would round it to whole numbers.
        granularity: which elements share a scale.
        symmetric: float 0 maps to the middle of the range (code 0 for a signed range), else to a zero point of its own.
        dynamic: the scale is computed from each tensor at run time, else once, from calibration data.
        quant_min, quant_max: bounds of the codes, both inclusive; by default all of the dtype's range, except that a
            symmetric signed spec leaves out its lowest code, so that ``-x`` is coded as minus the code of ``x``.
        observer: a callable that takes torch.ao's observer keywords (``dtype qscheme quant_min quant_max eps``, and
            ``ch_axis``, ``group_size``, ``is_dynamic`` where they apply) and returns an observer module. None: see
            `qpass.observer.observer_for`.
        eps: the smallest scale; by default ``torch.finfo(torch.float32).eps``.

    After construction `quant_min` and `quant_max` are ints, so two specs that mean the same range are equal.

    Raises:
        ConfigError: the fields contradict each other or the dtype.
    """

    dtype: torch.dtype = torch.int8
    granularity: Granularity = PerTensor()
    symmetric: bool = True
    dynamic: bool = False
    quant_min: int | None = None
    quant_max: int | None = None
    observer: Callable[..., Any] | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        _check_fields(self)
        low, high = RANGES[self.dtype]
        if self.symmetric and low < 0:
            low += 1
        object.__setattr__(self, "quant_min", low if self.quant_min is None else self.quant_min)
        object.__setattr__(self, "quant_max", high if self.quant_max is None else self.quant_max)
        _check_range(self)
        _check_granularity(self)

    @property
    def range(self) -> tuple[int, int]:
        """``(quant_min, quant_max)``, both inclusive."""
        assert self.quant_min is not None
        assert self.quant_max is not None
        return self.quant_min, self.quant_max

    @property
    def written(self) -> str:
        """``"int8 -127..127 per channel 0"``: what two specs must have in common for scales to mean the same."""
        return written(self.dtype, self.range, self.granularity, self.dynamic, self.symmetric)

    @property
    def qscheme(self) -> torch.qscheme:
        """torch's word for granularity and symmetry; groups count as channels, tokens as tensors."""
        if isinstance(self.granularity, PerChannel | PerGroup):
            return torch.per_channel_symmetric if self.symmetric else torch.per_channel_affine
        return torch.per_tensor_symmetric if self.symmetric else torch.per_tensor_affine

    @property
    def smallest_scale(self) -> float:
        """`eps`, or its default: no observer of this spec chooses a smaller scale."""
        return EPS if self.eps is None else self.eps

    @property
    def trains(self) -> bool:
        """Whether the tensor is rounded while the model is trained: whether `observer` makes fake-quantize modules.

        A class and what its ``with_args`` made say so themselves, also inside of a `functools.partial`. Any other
        callable says it by an attribute ``trains = True``; without one it is taken to make what only observes.
        """
        constructor = self.observer
        while isinstance(constructor, partial):
            constructor = constructor.func
        return bool(getattr(constructor, "trains", False))

    make_observer: ClassVar[Callable[..., Any]]
    """`qpass.observer.observer_for` of this spec; the observers, which are built on specs, put it here."""


def written(
    dtype: torch.dtype, bounds: tuple[int, int], granularity: Granularity, dynamic: bool, symmetric: bool
) -> str:
    """``"uint8 0..255 per tensor"``; of a dynamic tensor also how its scale is chosen."""
    where = "per tensor"
    if isinstance(granularity, PerChannel):
        where = f"per channel {granularity.axis}"
    elif isinstance(granularity, PerGroup):
        where = f"per group of {granularity.group_size}"
    elif isinstance(granularity, PerToken):
        where = "per token"
    how = "" if not dynamic else ", dynamic and symmetric" if symmetric else ", dynamic"
    return f"{dtype_name(dtype)} {bounds[0]}..{bounds[1]} {where}{how}"


def _check_fields(spec: QuantizationSpec) -> None:
    if spec.dtype in FLOAT8_RANGES:
        raise ConfigError(
            f"QuantizationSpec cannot store codes as {spec.dtype}: the q/dq operators that graphs carry round to whole "
            "numbers before they cast, so that 0.3 becomes 0",
            hint="use int8; as a cast, outside a prepared model, an 8-bit float is quantized by the operators of "
            "qpass.ops.quantized_decomposed",
        )
    if spec.dtype not in RANGES:
        names = [dtype_name(dtype) for dtype in RANGES]
        name = dtype_name(spec.dtype)
        raise ConfigError(
            f"QuantizationSpec cannot store codes as {spec.dtype}{near(name, names)}",
            hint=f"use one of {', '.join(names)}; a range below 8 bits is carried in int8 by quant_min and quant_max",
        )
    if not isinstance(spec.granularity, Granularity):
        raise ConfigError(
            f"QuantizationSpec granularity cannot be {spec.granularity!r}",
            hint="use PerTensor(), PerChannel(axis), PerGroup(group_size) or PerToken()",
        )
    for name in ("quant_min", "quant_max"):
        bound = getattr(spec, name)
        if bound is not None and not _is_int(bound):
            raise ConfigError(f"QuantizationSpec {name} must be an int or None, not {bound!r}")
    if spec.eps is not None and not (math.isfinite(spec.eps) and spec.eps > 0):
        raise ConfigError(f"QuantizationSpec eps must be positive and finite, not {spec.eps!r}")
    if spec.observer is not None and not callable(spec.observer):
        raise ConfigError(
            f"QuantizationSpec observer must be an observer class or a callable that makes one, not {spec.observer!r}"
        )


def _check_range(spec: QuantizationSpec) -> None:
    low, high = RANGES[spec.dtype]
    quant_min, quant_max = spec.range
    if quant_min >= quant_max:
        raise ConfigError(
            f"QuantizationSpec quant_min ({quant_min}) must be below quant_max ({quant_max})",
            hint="swap them, or leave both out to use the dtype's range",
        )
    if quant_min < low or quant_max > high:
        raise ConfigError(
            f"QuantizationSpec range {quant_min}..{quant_max} does not fit {spec.dtype}, which holds {low}..{high}",
            hint="narrow the range, or choose a wider dtype",
        )
    if spec.symmetric and quant_min < 0 and abs(quant_min + quant_max) > 1:
        raise ConfigError(
            f"QuantizationSpec is symmetric, but its range {quant_min}..{quant_max} is not centred on zero",
            hint=f"use {-quant_max}..{quant_max}, or symmetric=False",
        )


def _check_granularity(spec: QuantizationSpec) -> None:
    granularity = spec.granularity
    if isinstance(granularity, PerToken):
        if not spec.dynamic:
            raise ConfigError(
                "QuantizationSpec is per token but static: tokens seen in calibration say nothing about later ones",
                hint="set dynamic=True, or use PerTensor()",
            )
        allowed = ((-127, 127), (-128, 127)) if spec.symmetric else ((-128, 127),)
        if spec.dtype is not torch.int8 or spec.range not in allowed:
            raise ConfigError(
                f"QuantizationSpec is per token with range {spec.range[0]}..{spec.range[1]} of {spec.dtype}: "
                "the per-token operators know int8 in full only",
                hint="use dtype=torch.int8 without quant_min and quant_max, or PerTensor()",
            )
    elif spec.dynamic and not isinstance(granularity, PerTensor):
        raise ConfigError(
            f"QuantizationSpec is dynamic with {granularity!r}: a scale found at run time is per tensor or per token",
            hint="use PerTensor() or PerToken(), or dynamic=False",
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
