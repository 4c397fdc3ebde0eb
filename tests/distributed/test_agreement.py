"""Calls that do not fit each other: a typed error on every rank, and the group is as good as before."""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ranks
from qpass import comm
from qpass.comm.eager import agreement
from qpass.errors import AgreementError, ConfigError, InputError

CASES = [
    "wrong_numel", "wrong_dtype", "integers_here_floats_there", "wrong_codec", "wrong_op", "reordered_calls",
    "another_version", "another_source", "splits_that_do_not_fit", "a_refusal_reaches_all", "reordered_calls_in_debug",
    "debug_alone_is_not_needed_twice", "threads_do_not_wait_for_each_other", "groups_are_freed",
]  # fmt: skip


@functools.cache
def results(world: int) -> dict[str, list[str]]:
    return ranks.run(__file__, world, CASES, timeout=20)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_on_every_rank(world: int, case: str) -> None:
    assert results(world)[case] == [ranks.OK] * world


# What runs on each rank


def disagrees(call: Callable[[], Any], *words: str) -> None:
    """Raises AgreementError with all `words`, at once rather than after the timeout; the next call works again."""
    start = time.perf_counter()
    with pytest.raises(AgreementError) as raised:
        call()
    assert time.perf_counter() - start < 10, "the error came by timeout (20 s), not by comparison"
    message = str(raised.value)
    assert all(word in message for word in words), message
    x = torch.ones(10)
    comm.all_reduce(x, codec="fp32")
    assert x[0] == dist.get_world_size()


def pairs(rank: int, world: int, numel: Callable[[int], int], dtype: Callable[[int], torch.dtype], *words: str) -> None:
    """Every collective, with a number of elements or a dtype that depends on the rank."""
    n, kind = numel(rank), dtype(rank)
    disagrees(lambda: comm.all_reduce(torch.ones(n, dtype=kind)), "all_reduce", *words)
    disagrees(
        lambda: comm.all_gather(torch.ones(world * n, dtype=kind), torch.ones(n, dtype=kind)), "all_gather", *words
    )
    disagrees(
        lambda: comm.reduce_scatter(torch.ones(n, dtype=kind), torch.ones(world * n, dtype=kind)),
        "reduce_scatter",
        *words,
    )
    x = torch.ones(world * n, dtype=kind)
    disagrees(lambda: comm.all_to_all(torch.empty_like(x), x), "all_to_all", *words)
    disagrees(lambda: comm.broadcast(torch.ones(n, dtype=kind), 0), "broadcast", *words)


def wrong_numel(rank: int, world: int) -> None:
    pairs(rank, world, lambda rank: 1000 + rank, lambda rank: torch.float32, "numel: ", "rank 1 has")


def wrong_dtype(rank: int, world: int) -> None:
    kinds = (torch.float32, torch.bfloat16)
    pairs(rank, world, lambda rank: 2000, lambda rank: kinds[rank % 2], "dtype: rank 0 has 'torch.float32'")


def integers_here_floats_there(rank: int, world: int) -> None:
    kinds = (torch.int64, torch.float32)
    pairs(rank, world, lambda rank: 3000, lambda rank: kinds[rank % 2], "rank 0 has 'torch.int64'")


def wrong_codec(rank: int, world: int) -> None:
    codec = ("int8", "int8:64")[rank % 2]
    disagrees(lambda: comm.all_reduce(torch.ones(4000), codec=codec), "codec: ", "int8:64:bf16")


def wrong_op(rank: int, world: int) -> None:
    disagrees(lambda: comm.all_reduce(torch.ones(5000), ("sum", "avg")[rank % 2]), "op: ", "'avg'")


def reordered_calls(rank: int, world: int) -> None:
    def first() -> Any:
        return comm.all_reduce(torch.ones(6000))

    def second() -> Any:
        return comm.all_gather(torch.ones(6000 * world), torch.ones(6000))

    disagrees((first, second)[rank % 2], "collective: ", "'all_gather'")


def another_version(rank: int, world: int) -> None:
    agreement.VERSION += rank
    try:
        with pytest.raises(AgreementError, match="version: rank 0 has 1, rank 1 has 2"):
            comm.all_reduce(torch.ones(7000))
    finally:
        agreement.VERSION -= rank


def another_source(rank: int, world: int) -> None:
    disagrees(lambda: comm.broadcast(torch.ones(8000), rank % 2), "from rank 0", "from rank 1")


def splits_that_do_not_fit(rank: int, world: int) -> None:
    sends = [10] * world
    takes = [10] * world
    if rank == 0:
        takes[1] = 11
    call = functools.partial(comm.all_to_all, torch.empty(sum(takes)), torch.ones(10 * world), takes, sends)
    disagrees(call, "rank 1 sends 10 elements to rank 0, which expects 11")


def a_refusal_reaches_all(rank: int, world: int) -> None:
    """What one rank refuses by itself, the others hear of, and need not wait for."""
    start = time.perf_counter()
    if rank == 0:
        with pytest.raises(InputError, match=r"not [24] times the"):
            comm.all_gather(torch.ones(5), torch.ones(9000))
    else:
        with pytest.raises(AgreementError, match="rank 0: all_gather: output has 5 elements"):
            comm.all_gather(torch.ones(9000 * world), torch.ones(9000))
    with pytest.raises(ConfigError, match="did you mean 'int8'"):
        comm.all_reduce(torch.ones(9000), codec="int9")
    assert time.perf_counter() - start < 10


def reordered_calls_in_debug(rank: int, world: int) -> None:
    """Calls that were agreed before are compared again where debug is on."""
    a, b = torch.ones(300), torch.ones(400)
    comm.all_reduce(a)
    comm.all_reduce(b)
    comm.debug(True)
    try:
        disagrees(lambda: comm.all_reduce((a, b)[rank % 2]), "numel: rank 0 has 300, rank 1 has 400")
    finally:
        comm.debug(False)


def debug_alone_is_not_needed_twice(rank: int, world: int) -> None:
    """The second call of a kind exchanges no header: that is what makes the first cost nothing in a long run."""
    group = comm.eager.group.group_of(None)
    comm.all_reduce(torch.ones(500))
    before = group.agreements
    for _ in range(3):
        comm.all_reduce(torch.ones(500))
    assert group.agreements == before
    comm.all_reduce(torch.ones(501))
    assert group.agreements == before + 1


def threads_do_not_wait_for_each_other(rank: int, world: int) -> None:
    """Two threads, a group each; every rank is late in the other's, so each waits for what the other is to do."""
    groups = [dist.new_group() for _ in range(2)]

    def run(place: int, async_op: bool) -> float:
        time.sleep(0.5 * (place == rank % 2))
        x, start = torch.ones(600), time.perf_counter()
        work = comm.all_reduce(x, group=groups[place], codec="fp32", async_op=async_op)
        if async_op:
            work.wait()
        assert x[0] == world
        return time.perf_counter() - start

    for async_op in (False, True):
        with ThreadPoolExecutor(2) as threads:
            took = list(threads.map(run, range(2), [async_op] * 2))
        assert max(took) < 10, f"{took}: one waits for the timeout of the other (20 s)"
    for group in groups:
        dist.destroy_process_group(group)


def groups_are_freed(rank: int, world: int) -> None:
    """Threads, files and groups are as many as before, whether the user drops the group or destroys and keeps it."""

    def made() -> tuple[int, int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count(), len(dist.distributed_c10d._world.pg_map)

    def use(group: dist.ProcessGroup) -> None:
        x = torch.ones(700)
        comm.all_reduce(x, group=group)
        comm.all_reduce(x, group=group, async_op=True).wait()
        dist.destroy_process_group(group)

    use(dist.new_group())
    time.sleep(0.5)  # threads of earlier groups end
    before = made()
    kept = [dist.new_group() for _ in range(3)]
    gone, names = weakref.WeakSet(kept), [group.group_name for group in kept]
    for group in kept:
        use(group)
    use(dist.new_group())  # whatever is asked next frees what was made for destroyed groups
    twins = {f"qpass-twin-{name}-1" for name in names} & set(dist.distributed_c10d._world.pg_names.values())
    del kept, group
    deadline = time.monotonic() + 5
    while made() != before and time.monotonic() < deadline:  # threads end soon after their last job
        time.sleep(0.05)
    assert (made(), len(gone), twins) == (before, 0, set())
