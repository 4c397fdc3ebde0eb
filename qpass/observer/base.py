"""x -> x, and a note of what was seen: what every observer has in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from qpass.errors import CalibrationError
from qpass.numerics import EPS, RANGES
from qpass.spec import Granularity, QuantizationSpec

OBSERVED = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that can be observed."""


class ObserverBase(nn.Module):
    """Watches one tensor. `forward` returns the very tensor it was given; `calculate_qparams` says how to quantize it.

    Empty tensors are passed over. NaN and infinities never enter the statistics; they are counted in `nonfinite`. The
    statistics are float32 and int64 buffers, and stay so when the module is cast. Nothing is watched while the tensor
    has no data (meta device).

    A subclass writes `observe(x)`, which updates its buffers in place and returns how many values it left out.

    Attributes:
        spec: the QuantizationSpec that `calculate_qparams` answers for.
        batches: int64 scalar, tensors seen that held a finite value.
        nonfinite: int64 scalar, NaN and infinities left out.
    """

    batches: Tensor
    nonfinite: Tensor

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))

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
        return EPS if self.spec.eps is None else self.spec.eps

    @property
    def is_dynamic(self) -> bool:
        return self.spec.dynamic

    @property
    def has_data(self) -> bool:
        """Whether a finite value was seen since construction or `reset`."""
        return bool(self.batches > 0)

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself, after a look at it.

        Raises:
            CalibrationError: `x` is not of a floating dtype.
        """
        if x.dtype not in OBSERVED:
            raise CalibrationError(
                f"{type(self).__name__} cannot observe a tensor of {x.dtype}: only floating values are quantized.",
                hint="leave this operator in float: config.keep_float(...)",
            )
        if x.numel() > 0 and has_values(x, self.batches):
            left_out = self.observe(
                x.detach()
            )  # no gradient from here on, and no grad-mode region in an exported graph
            self.nonfinite.add_(left_out)
            self.batches.add_((left_out < x.numel()).to(torch.int64))
        return x

    def observe(self, x: Tensor) -> Tensor:
        """Take `x` into the statistics; return how many values were left out, being not finite (int64 scalar)."""
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """scale (float32) and zero_point (int32): one element per tensor, else shaped by the granularity.

        Without data they are 1 and the code of zero, with a warning.
        """
        raise NotImplementedError

    def reset(self) -> None:
        """Forget everything seen."""
        self.batches.zero_()
        self.nonfinite.zero_()

    def extra_repr(self) -> str:
        granularity = type(self.spec.granularity).__name__
        return f"{granularity}, {self.dtype}, {self.quant_min}..{self.quant_max}, symmetric={self.spec.symmetric}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Statistics move between devices, but are not cast: ``model.bfloat16()`` must not round them."""
        dtypes = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        assert all(self._buffers[name].dtype == dtype for name, dtype in dtypes.items())  # type: ignore[union-attr]
        return self


@dataclass(frozen=True)
class Constructor:
    """An observer or fake-quantize class and some of its keywords: what their `with_args` returns."""

    observer: type[Any]
    keywords: tuple[tuple[str, Any], ...]

    def __call__(self, **keywords: Any) -> Any:
        return self.observer(**{**dict(self.keywords), **keywords})

    def with_args(self, **keywords: Any) -> Constructor:
        """The same with more keywords; later ones win."""
        return self.observer.with_args(**{**dict(self.keywords), **keywords})


def spec_from_keywords(
    dtype: torch.dtype,
    qscheme: torch.qscheme,
    granularity: Granularity,
    quant_min: int | None,
    quant_max: int | None,
    eps: float | None,
    is_dynamic: bool = False,
) -> QuantizationSpec:
    """The spec that torch.ao's observer keywords describe: there a missing bound means the dtype's, symmetric or not.

    ``qint8 quint8 qint32`` stand for their plain storage dtypes.
    """
    dtype = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}.get(dtype, dtype)
    symmetric = qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    low, high = RANGES.get(dtype, (None, None))
    quant_min = low if quant_min is None else quant_min
    quant_max = high if quant_max is None else quant_max
    return QuantizationSpec(dtype, granularity, symmetric, is_dynamic, quant_min, quant_max, eps=eps)


def has_values(x: Tensor, statistics: Tensor) -> bool:
    """Whether `x` can be taken into the statistics: not on the meta device, nor fake while the statistics are real."""
    if torch.compiler.is_compiling():
        return True
    return not x.is_meta and (is_fake(statistics) or not is_fake(x))


def is_eager(x: Tensor) -> bool:
    """Whether Python may branch on values of `x`: no trace, no fake tensor, no dispatch mode is at work."""
    if torch.compiler.is_compiling() or type(x) not in (Tensor, nn.Parameter):
        return False
    return torch._C._len_torch_dispatch_stack() == 0
