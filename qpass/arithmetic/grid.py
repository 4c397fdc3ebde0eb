"""(x, scales, zero points) -> tensors that broadcast: the four ways to share a scale, and what is refused of each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic.numerics import CODE_RANGES
from qpass.errors import InputError


@dataclass(frozen=True, eq=False)
class Grid:
    """Scale and zero point in the form in which they broadcast with ``view(x)``; ``back(view(x))`` is `x`."""

    scale: Any
    zero_point: Any
    adds_first: bool = False
    group_size: int | None = None
    view: Callable[[Tensor], Tensor] = lambda x: x
    back: Callable[[Tensor], Tensor] = lambda viewed: viewed


def per_tensor(scale: Any, zero_point: Any) -> Grid:
    """One scale for everything: numbers, or tensors of one element, which like a number do not widen what they meet."""
    if not isinstance(scale, Tensor) and scale == 0:
        raise InputError("The scale is 0, and nothing can be divided by it")
    return Grid(_single(scale, "scale"), _single(zero_point, "zero_point"))


def per_channel(x: Tensor, scales: Tensor, zero_points: Tensor | None, axis: int) -> Grid:
    """A scale for each index of dimension `axis`: scales ``[x.shape[axis]]``; no zero points means zeros."""
    if not -x.dim() <= axis < x.dim():
        raise InputError(f"axis {axis} is out of range for a tensor of {x.dim()} dimensions")
    channel = axis % x.dim()
    size = x.shape[channel]
    _check_count(scales, zero_points, size, f"the {size} indices of dimension {channel}")
    shape = [size if dim == channel else 1 for dim in range(x.dim())]
    return Grid(scales.reshape(shape), _reshaped(zero_points, shape))


def per_token(x: Tensor, scales: Tensor, zero_points: Tensor) -> Grid:
    """A scale for each row, which is everything but the last dimension: scales ``[..., 1]``, or flat."""
    rows = math.prod(x.shape[:-1])  # torch.Size.numel() would turn symbolic sizes into numbers
    _check_count(scales, zero_points, rows, f"{rows} rows")
    shape = (*x.shape[:-1], 1) if x.dim() else ()
    return Grid(scales.reshape(shape), zero_points.reshape(shape), adds_first=True)


def per_group(x: Tensor, scales: Tensor, zero_points: Tensor | None, group_size: int) -> Grid:
    """A scale for each `group_size` neighbours of the last dimension: scales ``[..., K / group_size]``.

    A group wider than the row is the row, where the row has one scale. No zero points means zeros.
    """
    if x.dim() == 0:
        raise InputError("A tensor without dimensions has no groups")
    columns = x.shape[-1]
    size = group_size
    if group_size > columns and scales.dim() and scales.shape[-1] == 1:
        size = max(columns, 1)
    if size < 1 or columns % size != 0:
        raise InputError(f"group_size {group_size} does not divide the {columns} columns of the tensor")
    count = columns // size
    groups = math.prod(x.shape[:-1]) * count
    _check_count(scales, zero_points, groups, f"{groups} groups")
    shape = (*x.shape[:-1], count, 1)
    return Grid(
        scales.reshape(shape),
        _reshaped(zero_points, shape),
        adds_first=True,
        group_size=size,
        view=lambda x: x.unflatten(-1, (count, size)),
        back=lambda viewed: viewed.flatten(-2),
    )


def check_codes(dtype: torch.dtype, quant_min: Any, quant_max: Any) -> None:
    """Refuse a dtype that cannot hold codes, and bounds that it cannot hold; bounds in tensors are not looked at."""
    if dtype not in CODE_RANGES:
        raise InputError(
            f"Codes cannot be stored as {dtype}",
            hint=f"use one of {', '.join(map(str, CODE_RANGES))}; fewer bits are carried in int8 or uint8 by "
            "quant_min and quant_max",
        )
    low, high = CODE_RANGES[dtype]
    for bound in (quant_min, quant_max):
        if isinstance(bound, int) and not low <= bound <= high:
            raise InputError(f"A code of {bound} does not fit {dtype}, which holds {low}..{high}")
    if isinstance(quant_min, int) and isinstance(quant_max, int) and quant_min > quant_max:
        raise InputError(f"No code lies in {quant_min}..{quant_max}")


def _single(value: Any, name: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    torch._check_with(InputError, value.numel() == 1, lambda: f"{name} has {value.numel()} elements, not one")
    return value.reshape(())


def _check_count(scales: Tensor, zero_points: Tensor | None, count: int, of: str) -> None:
    for name, tensor in (("scales", scales), ("zero points", zero_points)):
        if tensor is not None:
            message = functools.partial("{} {} for {}.".format, tensor.numel(), name, of)
            torch._check_with(InputError, tensor.numel() == count, message)


def _reshaped(zero_points: Tensor | None, shape: Any) -> Any:
    return 0 if zero_points is None else zero_points.reshape(shape)
