"""all_reduce, reduce_scatter, all_gather, all_to_all, broadcast: `torch.distributed`'s, with coded payloads.

The arguments are those of ``dist.all_reduce``, ``reduce_scatter_tensor``, ``all_gather_into_tensor``,
``all_to_all_single`` and ``broadcast``, and `codec` besides. Tensors keep their dtype (float16, bfloat16, float32,
float64); sums are taken in float32 in rank order and the result is equal bit for bit on all ranks. Integers, bools and
complex numbers are sent as they are, by ``dist``. So is everything in a group of one rank, and what the cost model
declines where a `link` is given: the constants of the group from `calibrate_link`, equal on all ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager.one_call import AnyGroup, OneCall
from qpass.comm.policy.cost import Link
from qpass.comm.wire.codec import Codec
from qpass.errors import InputError, near


def all_reduce(
    tensor: Tensor,
    op: Any = "sum",
    group: AnyGroup = None,
    codec: str | Codec = "int8",
    async_op: bool = False,
    *,
    schedule: str = "auto",
    seed: int | None = None,
    link: Link | None = None,
) -> Any:
    """Replace `tensor` by the sum or average over the ranks.

    Args:
        op: "sum", "avg", or torch's ReduceOp.
        group: a process group; or a `DeviceMesh` of two dimensions (across nodes, inside a node), which sums inside
            losslessly and only sends every rank's share of the sum across; a `link` is then that across.
        schedule: "one_shot", "two_shot", or "auto".
        seed: of stochastic rounding; None counts the calls of the group.

    Returns:
        None, or a `Work` where `async_op`.
    """
    call = OneCall("all_reduce", group, codec, async_op, seed, link)
    with call:
        divides = call.takes_op(op)
        call.takes(tensor)
        if schedule not in ("auto", "one_shot", "two_shot"):
            raise InputError(f"There is no schedule {schedule!r}{near(schedule, ('auto', 'one_shot', 'two_shot'))}")
    return call.all_reduce(tensor, divides, schedule)


def reduce_scatter(
    output: Tensor,
    input: Tensor,
    op: Any = "sum",
    group: AnyGroup = None,
    codec: str | Codec = "int8",
    async_op: bool = False,
    *,
    seed: int | None = None,
    link: Link | None = None,
) -> Any:
    """Write the sum or average over the ranks of their `input`'s part for this rank to `output`.

    `input` holds W times the elements of `output`, rank after rank.
    """
    call = OneCall("reduce_scatter", group, codec, async_op, seed, link)
    with call:
        divides = call.takes_op(op)
        call.takes(output, input)
        call.holds(input, call.world, output, "input", "output")
    return call.reduce_scatter(output, input, divides)


def all_gather(
    output: Tensor,
    input: Tensor,
    group: AnyGroup = None,
    codec: str | Codec = "int8",
    async_op: bool = False,
    *,
    seed: int | None = None,
    link: Link | None = None,
) -> Any:
    """Write every rank's `input`, rank after rank, to `output`, which holds W times its elements."""
    call = OneCall("all_gather", group, codec, async_op, seed, link)
    with call:
        call.takes(output, input)
        call.holds(output, call.world, input, "output", "input")
    return call.all_gather(output, input)


def all_to_all(
    output: Tensor,
    input: Tensor,
    output_split_sizes: Sequence[int] | None = None,
    input_split_sizes: Sequence[int] | None = None,
    group: AnyGroup = None,
    codec: str | Codec = "int8",
    async_op: bool = False,
    *,
    seed: int | None = None,
    link: Link | None = None,
) -> Any:
    """Send a part of `input` to every rank and write the parts that come from them to `output`.

    Splits count indices of the first dimension, as in ``dist.all_to_all_single``; None cuts evenly. With splits
    a `link` is not asked: no rank knows the sizes of all others, so they could not decide alike.
    """
    call = OneCall("all_to_all", group, codec, async_op, seed, link)
    with call:
        call.takes(output, input)
        sends = call.splits(input, input_split_sizes, "input")
        receives = call.splits(output, output_split_sizes, "output")
    return call.all_to_all(output, input, output_split_sizes, input_split_sizes, receives, sends)


def broadcast(
    tensor: Tensor,
    src: int | None = None,
    group: AnyGroup = None,
    codec: str | Codec = "int8",
    async_op: bool = False,
    *,
    group_src: int | None = None,
    seed: int | None = None,
    link: Link | None = None,
) -> Any:
    """Replace `tensor` by rank `src`'s, coded and decoded, on all ranks, `src` among them."""
    call = OneCall("broadcast", group, codec, async_op, seed, link)
    with call:
        call.takes(tensor)
        if (src is None) == (group_src is None):
            raise InputError("A broadcast needs either src, a global rank, or group_src, a rank of the group")
        if src is not None:
            group_src = dist.get_group_rank(call.group.process_group, src)
    assert group_src is not None
    return call.broadcast(tensor, group_src)
