"""x -> x, and a note of what was seen: what observers that gather statistics have in common."""

from __future__ import annotations

import weakref
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from qpass.spec import QuantizationSpec
from qpass.spec.observers.base import ObserverBase, check_floating, check_not_transformed, has_values, is_eager


class StatisticsObserver(ObserverBase):
    """Watches one tensor. `forward` returns the very tensor it was given; `calculate_qparams` says how to quantize it.

    Empty tensors are passed over. NaN and infinities never enter the statistics; they are counted in `nonfinite`. The
    statistics are float32 and int64 buffers. Nothing is watched while the tensor has no data (meta device).

    A subclass writes `observe(x)`, which updates its buffers in place.

    Attributes:
        watches_constant: every call brings the same tensor, a weight: it is looked at once, and again, from the start,
            when its values have changed. Ranks that gather their statistics together look each time.
        batches: int64 scalar, tensors seen that held a finite value.
        nonfinite: int64 scalar, NaN and infinities left out.
    """

    batches: Tensor
    nonfinite: Tensor
    watches_constant = False

    def __init__(self, spec: QuantizationSpec) -> None:
        super().__init__(spec)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("nonfinite", torch.zeros((), dtype=torch.int64))

    def seen(self) -> Tensor:
        """Whether a finite value was seen since construction or `reset`."""
        return self.batches > 0

    def forward(self, x: Tensor) -> Tensor:
        """`x` itself, after a look at it.

        Raises:
            CalibrationError: `x` is not of a floating dtype.
        """
        check_floating(x, self)
        if self.watches_constant and self.process_group is None and is_eager(x) and not x.is_inference():
            if self._knows(x):
                return x
            self.reset()
        if has_values(x, self.batches) and (self.process_group is not None or _may_hold(x)):
            check_not_transformed(x, self.batches, self)
            # detached: no gradient from here on, and no grad-mode region in an exported graph
            left_out, seen = self.observe(x.detach())
            self.nonfinite.add_(left_out)
            self.batches.add_(seen.to(torch.int64))
        return x

    def observe(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Take `x`, which may be empty, into the statistics.

        Returns:
            how many values were left out, being not finite (int64 scalar), and whether any was taken (bool scalar).
        """
        raise NotImplementedError

    def extra_repr(self) -> str:
        counts = "" if self.batches.is_meta else f", batches={int(self.batches)}, nonfinite={int(self.nonfinite)}"
        return super().extra_repr() + counts

    def reset(self) -> None:
        self.batches.zero_()
        self.nonfinite.zero_()

    def _knows(self, x: Tensor) -> bool:
        """Whether the statistics are those of the values that `x` has now; from here on they are."""
        owner = x if x._base is None else x._base
        last = _LAST.get(self)
        _LAST[self] = weakref.ref(owner), owner._version, x.data_ptr()
        same = last is not None and last[0]() is owner and last[1:] == (owner._version, x.data_ptr())
        return same and self.has_data


_LAST: WeakKeyDictionary[StatisticsObserver, tuple[weakref.ref[Tensor], int, int]] = WeakKeyDictionary()
"""What observers of constants saw last: the tensor that owns the values, how often it was written to, where it lies."""


def _may_hold(x: Tensor) -> bool:
    """Whether a tensor may have elements; True for a symbolic size that may be anything."""
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # imports sympy

    return bool(guard_or_true(x.numel() > 0))
