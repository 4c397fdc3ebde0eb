"""torch.distributed._functional_collectives, compressed: new tensors out, and gradients that travel compressed back.

    all_gather_single(x, dim, group)              backward: reduce_scatter (sum)
    reduce_scatter_single(x, op, dim, group)      backward: all_gather
    all_reduce(x, op, group)                      backward: all_reduce
    all_to_all_single(x, out, in, group)          backward: all_to_all with the splits exchanged
    broadcast(x, src, group)                      none, as in torch

The gradient of rounding is taken to be that of the identity. An average passes on an averaged gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qpass import torch_private
from qpass.comm.eager import collectives
from qpass.comm.wire.codec import Codec
from qpass.errors import InputError
from qpass.torch_private import functional_collectives as funcol

Run = Callable[[Tensor], Tensor]
Call = dict[str, Any]


class _Both(torch.autograd.Function):
    """A function given together with its derivative's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Run, run_back: Run) -> Tensor:
        ctx.run_back = run_back
        return run(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return ctx.run_back(gradients[0].contiguous()), None, None


def all_gather(call: Call, how: Codec) -> Tensor:
    """A gather along any dimension: ``[..., n, ...] -> [..., W * n, ...]``."""
    group, dim = process_group(call["group"]), call["gather_dim"]
    return _Both.apply(call["self"], _gather(group, how, dim), _scatter(group, how, dim, "sum"))


def reduce_scatter(call: Call, how: Codec) -> Tensor:
    """A reduction of which each rank keeps its part along any dimension: ``[..., W * n, ...] -> [..., n, ...]``."""
    group, dim, op = process_group(call["group"]), call["scatter_dim"], call["reduceOp"].lower()
    if call["self"].shape[dim] % group.size():
        raise InputError(f"reduce_scatter cannot cut {call['self'].shape[dim]} indices into {group.size()} even parts")
    return _Both.apply(call["self"], _scatter(group, how, dim, op), _gather(group, how, dim, op))


def all_reduce(call: Call, how: Codec) -> Tensor:
    """The sum or average over the ranks, in a new tensor."""
    group, op = process_group(call["group"]), call["reduceOp"].lower()

    def run(x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        collectives.all_reduce(out, op, group, how)
        return out

    return _Both.apply(call["self"], run, run)


def all_to_all(call: Call, how: Codec) -> Tensor:
    """Parts of dimension 0 to every rank, and parts from every rank."""
    group, outputs, inputs = process_group(call["group"]), call["output_split_sizes"], call["input_split_sizes"]

    def run_with(outputs: Sequence[int] | None, inputs: Sequence[int] | None) -> Run:
        def run(x: Tensor) -> Tensor:
            out = x.new_empty(x.shape if outputs is None else (sum(outputs), *x.shape[1:]))
            collectives.all_to_all(out, x, outputs, inputs, group, how)
            return out

        return run

    return _Both.apply(call["self"], run_with(outputs, inputs), run_with(inputs, outputs))


def broadcast(call: Call, how: Codec) -> Tensor:
    """Rank src's tensor as all ranks decode it, in a new tensor; it has no gradient."""
    out = call["self"].detach().clone(memory_format=torch.contiguous_format)
    collectives.broadcast(out, call["src"], process_group(call["group"]), how)
    return out


def process_group(group: Any) -> dist.ProcessGroup:
    """The process group that torch's functional collectives would use: one, its name, a mesh, or a mesh's dimension.

    Raises:
        InputError: a list of ranks, for which torch itself would have to find a group.
    """
    if isinstance(group, DeviceMesh):
        return group.get_group()
    if isinstance(group, tuple) and len(group) == 2 and isinstance(group[0], DeviceMesh):
        return group[0].get_group(group[1])
    if isinstance(group, str):
        resolve: Any = torch_private.resolve_process_group  # by name, as the operators do it
        return resolve(group)
    if isinstance(group, dist.ProcessGroup):
        return group
    raise InputError(f"A process group is needed, not {group!r}", hint="make one with torch.distributed.new_group")


def _gather(group: dist.ProcessGroup, how: Codec, dim: int, op: str = "sum") -> Run:
    def run(x: Tensor) -> Tensor:
        parts = x.new_empty((group.size(), *x.shape))
        collectives.all_gather(parts, x, group, how)
        whole = torch.cat(list(parts), dim) if dim % x.dim() else parts.flatten(0, 1)
        return whole / group.size() if op == "avg" else whole

    return run


def _scatter(group: dist.ProcessGroup, how: Codec, dim: int, op: str) -> Run:
    def run(x: Tensor) -> Tensor:
        parts = torch.stack(x.chunk(group.size(), dim))
        out = parts.new_empty(parts.shape[1:])
        collectives.reduce_scatter(out, parts, op, group, how)
        return out

    return run


_TABLE: dict[str, Callable[[Call, Codec], Tensor]] = {
    "all_gather_single": all_gather,
    "all_gather_single_autograd": all_gather,
    "all_gather_tensor": all_gather,
    "all_gather_tensor_autograd": all_gather,
    "all_reduce": all_reduce,
    "all_to_all_single": all_to_all,
    "all_to_all_single_autograd": all_to_all,
    "broadcast": broadcast,
    "reduce_scatter_single": reduce_scatter,
    "reduce_scatter_single_autograd": reduce_scatter,
    "reduce_scatter_tensor": reduce_scatter,
    "reduce_scatter_tensor_autograd": reduce_scatter,
}

FUNCTIONS = {getattr(funcol, name): run for name, run in _TABLE.items() if hasattr(funcol, name)}
"""Function of `torch.distributed._functional_collectives` -> what it does when compressed."""
