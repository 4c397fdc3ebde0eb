"""x -> finite minimum, finite maximum: NaN and infinities are left out, and counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from qpass.spec.observers.base import is_eager

LARGEST = torch.finfo(torch.float32).max


def extrema(x: Tensor, dims: Sequence[int] | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Minimum and maximum of the finite values of `x` over `dims` (None: all), and the number of values left out.

    Clean tensors, the rule, are reduced as they lie, with no temporary of their size. Under a trace, where Python
    cannot look at values, every tensor is masked first.

    Returns:
        low, high: float32, shaped by the other dimensions; ``+inf, -inf`` where there is no finite value.
        left_out: int64 scalar. A float64 value beyond float32's range counts as not finite.
    """
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    dims = tuple(range(x.dim())) if dims is None else tuple(dim % x.dim() for dim in dims)
    # an exported program takes batches of any size, also where the symbol was traced as if it were at least 2
    filled = statically_known_true(x.numel() > 0) and not torch.compiler.is_exporting()
    if filled and is_eager(x):
        low, high = _reduce(x, x, dims)
        if bool((low.isfinite() & high.isfinite()).all()):
            return low, high, torch.zeros((), dtype=torch.int64, device=x.device)
    usable = finite(x)
    left_out = (~usable).sum()
    for_low, for_high = torch.where(usable, x, torch.inf), torch.where(usable, x, -torch.inf)
    if not filled:  # nothing has no minimum; one value more, the neutral one, makes no difference elsewhere
        for_low, for_high = _with_one_more(for_low, dims, torch.inf), _with_one_more(for_high, dims, -torch.inf)
        dims = (-1,)
    low, high = _reduce(for_low, for_high, dims)
    return low, high, left_out


def finite(x: Tensor) -> Tensor:
    """Where `x` is finite as a float32; NaN compares false."""
    return x.abs() <= min(torch.finfo(x.dtype).max, LARGEST)


def _reduce(for_low: Tensor, for_high: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if for_low is for_high and len(dims) == for_low.dim():
        low, high = torch.aminmax(for_low)
    else:
        low, high = for_low.amin(dims), for_high.amax(dims)
    return low.to(torch.float32), high.to(torch.float32)


def _with_one_more(x: Tensor, dims: tuple[int, ...], value: float) -> Tensor:
    """`x` with `dims` flattened into the last dimension, and `value` behind its elements."""
    kept = [dim for dim in range(x.dim()) if dim not in dims]
    return pad(x.permute(*kept, *dims).flatten(len(kept)) if dims else x.unsqueeze(-1), (0, 1), value=value)
