"""A rank dies, or is slow: the others get an error that names the collective, soon, and never wrong data."""

from __future__ import annotations

import functools
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from qpass import comm
from qpass.errors import AgreementError

TIMEOUT = 4.0
COLLECTIVES = ["all_reduce", "all_gather", "reduce_scatter", "all_to_all"]


def call(name: str, group: dist.ProcessGroup | None = None, async_op: bool = False) -> Tensor:
    """The collective over ones, on any group; its result, awaited."""
    world = dist.get_world_size(group)
    few, many = torch.ones(1000), torch.ones(1000 * world)
    result = many if name == "all_gather" else few
    options = {"group": group, "codec": "fp32", "async_op": async_op}
    if name == "all_reduce":
        work = comm.all_reduce(few, **options)
    elif name == "all_to_all":
        result = torch.empty_like(many)
        work = comm.all_to_all(result, many, **options)
    else:
        arguments = (many, few) if name == "all_gather" else (few, many)
        work = getattr(comm, name)(*arguments, **options)
    if async_op:
        work.wait()
    return result


def assert_fails(name: str, why: str, **options: bool) -> None:
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match=rf"(?s)qpass\.comm\.{name}|{why}"):
        call(name, **options)
    assert time.perf_counter() - start < TIMEOUT + 2


@pytest.mark.parametrize("moment", ["before", "between"])
@pytest.mark.parametrize(
    ("world", "name"),
    [
        (world, name)
        if (world, name) in ((2, "all_reduce"), (4, "all_to_all"))
        else pytest.param(world, name, marks=pytest.mark.slow)
        for world in (2, 4)
        for name in COLLECTIVES
    ],
)
def test_a_killed_rank(world: int, name: str, moment: str) -> None:
    case = f"killed_{moment}_{name}"
    assert ranks.run(__file__, world, [case], TIMEOUT, dies=world - 1)[case][:-1] == [ranks.OK] * (world - 1)


@functools.cache
def slow_ranks(world: int) -> dict[str, list[str]]:
    return ranks.run(__file__, world, [f"slow_{name}" for name in COLLECTIVES], TIMEOUT)


@pytest.mark.slow
@pytest.mark.parametrize("name", COLLECTIVES)
@pytest.mark.parametrize("world", [2, 4])
def test_a_slow_rank(world: int, name: str) -> None:
    assert slow_ranks(world)[f"slow_{name}"] == [ranks.OK] * world


# What runs on each rank


def killed_before(name: str, rank: int, world: int) -> None:
    """The rank is gone when the others plan their first call: the agreement fails."""
    if rank == world - 1:
        os._exit(1)
    assert_fails(name, "Not all ranks made the call")


def killed_between(name: str, rank: int, world: int) -> None:
    """The call was made before, so nothing is agreed any more: the transport fails, and torch's error has our name."""
    expected = float(world) if name in ("all_reduce", "reduce_scatter") else 1.0
    assert (call(name) == expected).all()
    assert (call(name, async_op=True) == expected).all()
    if rank == world - 1:
        os._exit(1)
    for async_op in (False, True):
        start = time.perf_counter()
        with pytest.raises(RuntimeError, match=rf"qpass\.comm\.{name} on group '0'") as raised:
            call(name, async_op=async_op)
        assert not isinstance(raised.value, AgreementError)
        assert time.perf_counter() - start < TIMEOUT + 2


def slow(name: str, rank: int, world: int) -> None:
    """In a group of its own, since none is of use after a timeout; the slow rank hears of it as well."""
    group = dist.new_group(list(range(world)))
    call(name, group)
    if rank == world - 1:
        time.sleep(TIMEOUT + 1)
    start = time.perf_counter()
    with pytest.raises(RuntimeError, match=rf"qpass\.comm\.{name} on group"):
        call(name, group)
    assert time.perf_counter() - start < TIMEOUT + 2
    if rank != world - 1:
        time.sleep(1.5)


for _name in COLLECTIVES:
    globals()[f"killed_before_{_name}"] = functools.partial(killed_before, _name)
    globals()[f"killed_between_{_name}"] = functools.partial(killed_between, _name)
    globals()[f"slow_{_name}"] = functools.partial(slow, _name)
