"""x -> finite minimum, finite maximum: NaN and infinities are left out, and counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.observer.base import is_eager

LARGEST = torch.finfo(torch.float32).max


def extrema(x: Tensor, dims: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum and maximum of the finite values of `x` over `dims` (None: all), and the number of values left out.

    Clean tensors, the rule, are reduced as they lie, with no temporary of their size. Under a trace, where Python
    cannot look at values, every tensor is masked first.

    Returns:
        low, high: float32, shaped by the other dimensions; ``+inf, -inf`` where there is no finite value.
        left_out: int64 scalar. A float64 value beyond float32's range counts as not finite.
    """
    dims = tuple(range(x.dim())) if dims is None else tuple(dims)
    if is_eager(x):
        low, high = _reduce(x, x, dims)
        if bool((low.isfinite() & high.isfinite()).all()):
            return low, high, torch.zeros((), dtype=torch.int64, device=x.device)
    usable = finite(x)
    low, high = _reduce(torch.where(usable, x, torch.inf), torch.where(usable, x, -torch.inf), dims)
    return low, high, (~usable).sum()


def finite(x: Tensor) -> Tensor:
    """Where `x` is finite as a float32; NaN compares false."""
    return x.abs() <= LARGEST if x.dtype == torch.float64 else x.isfinite()


def _reduce(for_low: Tensor, for_high: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if for_low is for_high and len(dims) == for_low.dim():
        low, high = torch.aminmax(for_low)
    else:
        low, high = for_low.amin(dims), for_high.amax(dims)
    return low.to(torch.float32), high.to(torch.float32)
