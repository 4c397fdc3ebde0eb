"""A large tensor a block at a time: what is computed in between stays in cache and costs no memory to speak of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from qpass import torch_private

BLOCK = 1 << 18
"""Elements that are worked on at once: 1 MiB of float32, so that temporaries stay in cache."""


def fill(out: Tensor, x: Tensor, operands: Sequence[Any], work: Callable[..., Tensor]) -> Tensor:
    """``out[block] = work(x[block], *operands[block])`` for every block, in the order in which `x` lies in memory.

    Args:
        out: where to write, shaped like `x`; returned.
        operands: numbers, or tensors that broadcast with `x` without widening it.
        work: may write into nothing but what it makes itself.
    """
    if x.numel() <= BLOCK:
        return out.copy_(work(x, *operands))
    order = sorted(range(x.dim()), key=x.stride, reverse=True)
    dims = x.dim()
    whole, target = x.permute(order), out.permute(order)
    moved = [
        o.reshape([1] * (dims - o.dim()) + list(o.shape)).permute(order) if isinstance(o, Tensor) and o.dim() else o
        for o in operands
    ]
    for block in _blocks(whole.shape):
        target[block] = work(whole[block], *(_part(operand, block) for operand in moved))
    return out


def can_fill(x: Tensor, operands: Sequence[Any]) -> bool:
    """Whether `fill` serves: plain tensors on a CPU that nobody traces, transforms or differentiates.

    Elsewhere a kernel is written as one expression over whole tensors, which compilers and transforms can see through.
    """
    if torch.compiler.is_compiling() or torch_private.len_torch_dispatch_stack():
        return False
    if torch_private.peek_interpreter_stack() is not None:
        return False
    tensors = [x, *(operand for operand in operands if isinstance(operand, Tensor))]
    if not all(type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu" for t in tensors):
        return False
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return False
    return all(_fits(t.shape, x.shape) for t in tensors[1:])


def _fits(shape: Sequence[int], into: Sequence[int]) -> bool:
    """Whether a tensor of that shape broadcasts without widening the other."""
    ends = zip(reversed(shape), reversed(into), strict=False)
    return len(shape) <= len(into) and all(size in (1, other) for size, other in ends)


def _part(operand: Any, block: tuple[slice, ...]) -> Any:
    if not isinstance(operand, Tensor) or operand.dim() == 0:
        return operand
    return operand[tuple(p if size > 1 else slice(None) for p, size in zip(block, operand.shape, strict=True))]


def _blocks(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut a tensor of that shape into blocks of at most `BLOCK` elements."""
    if math.prod(shape) <= BLOCK:
        yield tuple(slice(None) for _ in shape)
        return
    row = math.prod(shape[1:])
    if row > BLOCK:
        for index in range(shape[0]):
            for rest in _blocks(shape[1:]):
                yield slice(index, index + 1), *rest
        return
    step = BLOCK // row
    for start in range(0, shape[0], step):
        yield slice(start, start + step), *(slice(None) for _ in shape[1:])
