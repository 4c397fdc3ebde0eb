"""Whatever goes wrong on one rank: the others get a typed error, soon, or the right result; never wrong data.

A cell is one fault in one collective in a group of 2 or 4. A rank dies in a group of processes of its own, is slow in
a group of its own; all other cells of a size share one, since it must be as good after an error as before.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from qpass import comm
from qpass.comm.eager import agreement
from qpass.errors import AgreementError

TIMEOUT = 4.0
WORLDS = (2, 4)
COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
FAULTS = ("nan", "inf", "empty", "wrong_numel", "wrong_dtype", "reordered_calls", "another_version")
SUMS = ("all_reduce", "reduce_scatter")


def share(rank: int, numel: int = 1000) -> Tensor:
    """What a rank sends to each other one: exact in int8, for every block's largest magnitude is 127 of its steps."""
    index = torch.arange(numel)
    return torch.where(index % 4 == 0, 127, index % 101 - 50) * 2.0**rank


def call(name: str, mine: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False) -> Tensor:
    """The collective over `mine`, or over equal parts of it for each rank; its result, awaited."""
    world = dist.get_world_size(group)
    result = mine.clone() if name == "all_reduce" else torch.empty_like(mine)
    many = mine.repeat(world)
    if name == "all_reduce":
        work = comm.all_reduce(result, group=group, async_op=async_op)
    elif name == "reduce_scatter":
        work = comm.reduce_scatter(result, many, group=group, async_op=async_op)
    else:
        result = torch.empty_like(many)
        work = getattr(comm, name)(result, mine if name == "all_gather" else many, group=group, async_op=async_op)
    if async_op:
        work.wait()
    return result


def expected(name: str, parts: list[Tensor]) -> Tensor:
    """What `call` gives where rank r holds ``parts[r]``."""
    return functools.reduce(torch.add, parts) if name in SUMS else torch.cat(parts)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_cell(world: int, name: str, fault: str) -> None:
    assert results(world)[f"{fault}_{name}"] == [ranks.OK] * world


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_a_slow_rank(world: int) -> None:
    """Of all collectives at once: what fails names its own."""
    assert ranks.run(__file__, world, ["slow_ranks"], TIMEOUT)["slow_ranks"] == [ranks.OK] * world


@pytest.mark.parametrize("moment", ["before", "between"])
@pytest.mark.parametrize(
    ("world", "name"),
    [
        (world, name)
        if (world, name) in ((2, "all_reduce"), (4, "all_to_all"))
        else pytest.param(world, name, marks=pytest.mark.slow)
        for world in WORLDS
        for name in COLLECTIVES
    ],
)
def test_a_killed_rank(world: int, name: str, moment: str) -> None:
    case = f"killed_{moment}_{name}"
    assert ranks.run(__file__, world, [case], TIMEOUT, dies=world - 1)[case][:-1] == [ranks.OK] * (world - 1)


@functools.cache
def results(world: int) -> dict[str, list[str]]:
    return ranks.run(__file__, world, [f"{fault}_{name}" for name in COLLECTIVES for fault in FAULTS], TIMEOUT)


# What runs on each rank


def raises_soon(
    run: Callable[[], object], why: str, error: type[Exception] = RuntimeError, within: float = TIMEOUT + 2
) -> None:
    start = time.perf_counter()
    with pytest.raises(error, match=why) as raised:
        run()
    assert error is not RuntimeError or not isinstance(raised.value, AgreementError)
    assert time.perf_counter() - start < within


def works(name: str, rank: int, world: int) -> None:
    """The group is as good as it was."""
    assert torch.equal(call(name, share(rank)), expected(name, [share(other) for other in range(world)]))


def lost(name: str, rank: int, world: int, bad: float) -> None:
    """The block of the last rank's value that is not finite is NaN on all ranks, and no other value is touched."""
    parts = [share(other) for other in range(world)]
    mine = parts[rank].clone()
    if rank == world - 1:
        mine[300] = bad
    parts[world - 1][256:384] = torch.nan
    found, right = call(name, mine), expected(name, parts)
    assert torch.equal(found.isnan(), right.isnan())
    assert torch.equal(found.nan_to_num(7), right.nan_to_num(7))


def nan(name: str, rank: int, world: int) -> None:
    lost(name, rank, world, float("nan"))


def inf(name: str, rank: int, world: int) -> None:
    lost(name, rank, world, float("inf"))


def empty(name: str, rank: int, world: int) -> None:
    assert call(name, share(rank, 0)).shape == (0,)
    works(name, rank, world)


def wrong_numel(name: str, rank: int, world: int) -> None:
    last = rank == world - 1
    raises_soon(lambda: call(name, share(rank, 1100 + last)), rf"qpass\.comm\.{name}", AgreementError)
    works(name, rank, world)


def wrong_dtype(name: str, rank: int, world: int) -> None:
    mine = share(rank, 1200).to(torch.bfloat16 if rank == world - 1 else torch.float32)
    raises_soon(lambda: call(name, mine), "dtype: rank 0 has 'torch.float32'", AgreementError)
    works(name, rank, world)


def reordered_calls(name: str, rank: int, world: int) -> None:
    other = COLLECTIVES[COLLECTIVES.index(name) - 1]
    order = (other, name) if rank == world - 1 else (name, other)
    raises_soon(lambda: call(order[0], share(rank, 1300)), f"collective: rank 0 has '{name}'", AgreementError)
    works(name, rank, world)


def another_version(name: str, rank: int, world: int) -> None:
    last = rank == world - 1
    agreement.VERSION += last
    try:
        raises_soon(lambda: call(name, share(rank, 1400)), "version: rank 0 has 1", AgreementError)
    finally:
        agreement.VERSION -= last
    works(name, rank, world)


def slow_ranks(rank: int, world: int) -> None:
    """All collectives at once, each in a group of its own, since none is of use after a timeout."""
    timeout = timedelta(seconds=TIMEOUT)
    groups = [(name, dist.new_group(list(range(world)), timeout)) for name in COLLECTIVES]
    for name, group in groups:
        call(name, share(rank), group)
    if rank == world - 1:
        time.sleep(TIMEOUT + 1)

    def fails(name: str, group: dist.ProcessGroup) -> None:
        raises_soon(lambda: call(name, share(rank), group), rf"qpass\.comm\.{name} on group")

    with ThreadPoolExecutor(len(groups)) as threads:
        list(threads.map(fails, *zip(*groups, strict=True)))
    if rank != world - 1:
        time.sleep(1.5)  # the slow rank, too, is to hear of it from the group, not from a process that is gone


def killed_before(name: str, rank: int, world: int) -> None:
    """The rank is gone when the others plan their first call: the agreement fails, long before the timeout."""
    if rank == world - 1:
        os._exit(1)
    why = rf"Not all ranks made the call[^\0]*rank {world - 1} is gone: .*[Cc]onnection"
    raises_soon(lambda: call(name, share(rank)), why, AgreementError, within=TIMEOUT - 1)


def killed_between(name: str, rank: int, world: int) -> None:
    """The call was made before, so nothing is agreed any more: the transport fails, and torch's error has our name."""
    works(name, rank, world)
    call(name, share(rank), async_op=True)
    if rank == world - 1:
        os._exit(1)
    for async_op in (False, True):
        again = functools.partial(call, name, share(rank), async_op=async_op)
        raises_soon(again, rf"qpass\.comm\.{name} on group '0'")


def _cells() -> Iterator[tuple[str, Callable[[int, int], None]]]:
    faults = (
        nan,
        inf,
        empty,
        wrong_numel,
        wrong_dtype,
        reordered_calls,
        another_version,
        killed_before,
        killed_between,
    )
    for name in COLLECTIVES:
        for fault in faults:
            yield f"{fault.__name__}_{name}", functools.partial(fault, name)


globals().update(_cells())
