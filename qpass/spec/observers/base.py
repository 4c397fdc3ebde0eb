"""x -> x, and an answer how to quantize it: what every observer has in common, one that rounds included."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qpass import torch_private
from qpass.errors import CalibrationError
from qpass.ir.observer import Observer
from qpass.spec import QuantizationSpec
from qpass.torch_private import is_fake

OBSERVED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that can be observed."""


class ObserverBase(Observer):
    """Stands on one tensor, and answers how to quantize it.

    A subclass writes `forward(x)` and `choose_qparams()`. Buffers and parameters move between devices but are never
    cast: ``model.bfloat16()`` must not round them.

    Attributes:
        spec: the QuantizationSpec that `calculate_qparams` answers for.
        process_group: name of the group over which statistics are reduced; None: every process has its own.
    """

    trains: ClassVar[bool] = False
    """Whether it rounds while the model is trained, and has qparams that follow: a fake-quantize module."""

    spec: QuantizationSpec
    process_group: str | None = None

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__()
        self.spec = spec

    @classmethod
    def with_args(cls, **keywords: Any) -> Constructor:
        """A constructor with some keywords given; keywords of the call win. It compares and hashes by its contents."""
        return Constructor(cls, tuple(sorted(keywords.items())))

    @property
    def dtype(self) -> torch.dtype:
        return self.spec.dtype

    @property
    def qscheme(self) -> torch.qscheme:
        return self.spec.qscheme

    @property
    def quant_min(self) -> int:
        return self.spec.range[0]

    @property
    def quant_max(self) -> int:
        return self.spec.range[1]

    @property
    def eps(self) -> float:
        return self.spec.smallest_scale

    @property
    def is_dynamic(self) -> bool:
        return self.spec.dynamic

    @property
    def has_data(self) -> bool:
        """Whether `calculate_qparams` rests on data, or needs none."""
        return bool(self.seen())

    def seen(self) -> Tensor:
        """`has_data` as a bool scalar, for graphs that cannot branch on it."""
        return torch.tensor(True)

    def take_shape(self, x: Tensor) -> None:
        """Give the buffers the shape that tensors like `x` need, before the first of them is observed."""

    def choose_qparams(self) -> tuple[Tensor, Tensor]:
        """`calculate_qparams` without a look at any value, so that it can be traced."""
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """scale (float32) and zero_point (int32): one element per tensor, else shaped by the granularity.

        Without data they are 1 and the code of zero, with a warning.
        """
        if not self.has_data:
            warnings.warn(f"{type(self).__name__} has seen no data: its scale is 1.", stacklevel=2)
        return self.choose_qparams()

    def reset(self) -> None:
        """Forget everything seen."""

    def reset_parameters(self) -> None:
        """The state of a new module, written in place: what ``to_empty`` after construction on meta leaves undone."""
        self.reset()

    def extra_repr(self) -> str:
        granularity = type(self.spec.granularity).__name__
        return f"{granularity}, {self.dtype}, {self.quant_min}..{self.quant_max}, symmetric={self.spec.symmetric}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self


@dataclass(frozen=True)
class Constructor:
    """An observer class and some of its keywords: what `ObserverBase.with_args` returns."""

    observer: type[ObserverBase]
    keywords: tuple[tuple[str, Any], ...]

    @property
    def trains(self) -> bool:
        """That of the class."""
        return self.observer.trains

    def __call__(self, **keywords: Any) -> ObserverBase:
        return self.observer(**{**dict(self.keywords), **keywords})

    def with_args(self, **keywords: Any) -> Constructor:
        """The same with more keywords; later ones win."""
        return self.observer.with_args(**{**dict(self.keywords), **keywords})


def check_floating(x: Tensor, module: nn.Module) -> None:
    """Refuse what is not quantized.

    Raises:
        CalibrationError: `x` is not of a floating dtype.
    """
    if x.dtype not in OBSERVED:
        raise CalibrationError(
            f"{type(module).__name__} cannot observe a tensor of {x.dtype}: only floating values are quantized",
            hint="leave this operator in float: config.keep_float(...)",
        )


def has_values(x: Tensor, statistics: Tensor) -> bool:
    """Whether `x` can be taken into the statistics: not on the meta device, nor fake while the statistics are real."""
    if torch.compiler.is_compiling():
        return True
    return not x.is_meta and (is_fake(statistics) or not is_fake(x))


def check_not_transformed(x: Tensor, statistics: Tensor, module: nn.Module) -> None:
    """Refuse to take a tensor of ``torch.func.vmap`` or ``grad`` into statistics that the transform does not hold.

    Raises:
        CalibrationError: `x` belongs to a function transform, and `statistics` do not.
    """
    wrapped = torch_private.is_functorch_wrapped_tensor
    if not torch.compiler.is_compiling() and wrapped(x) and not wrapped(statistics):
        raise CalibrationError(
            f"{type(module).__name__} cannot observe inside torch.func.vmap or grad: a transform may not write to the "
            "buffers of a module",
            hint="call the model on batches first; then model.eval(), or qpass.fake_quantize.freeze_observers(model)",
        )


def is_eager(x: Tensor) -> bool:
    """Whether Python may branch on values of `x`: no trace, fake tensor, dispatch mode or function transform is at
    work."""
    return is_readable(x) and torch_private.peek_interpreter_stack() is None


def is_readable(x: Tensor) -> bool:
    """Whether `x` has one value for all, also where a function transform is at work on others."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    return torch_private.len_torch_dispatch_stack() == 0 and not torch_private.is_functorch_wrapped_tensor(x)
