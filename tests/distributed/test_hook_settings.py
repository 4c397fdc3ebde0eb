"""Ranks whose DDP hooks differ: an error on every rank in the first step, that names what differs."""

from __future__ import annotations

import functools
import time
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ranks
from distributed.hook_defects import Bucket
from qpass import comm
from qpass.comm.eager import agreement
from qpass.errors import AgreementError

CASES = ["another_codec", "another_warm_up", "feedback_here_alone", "the_same_again", "no_hook_elsewhere"]


@functools.cache
def results(world: int) -> dict[str, list[str]]:
    return ranks.run(__file__, world, CASES, timeout=20)


@pytest.mark.parametrize("case", CASES)
def test_on_every_rank(case: str) -> None:
    assert results(2)[case] == [ranks.OK] * 2


# What runs on each rank


def differ(words: str, *options: dict[str, Any], rank: int) -> None:
    """A step of a model whose ranks have hooks of different options; its error comes at once, not by timeout (20 s)."""
    model, start = DistributedDataParallel(nn.Linear(40, 3)), time.perf_counter()
    model.register_comm_hook(None, comm.ddp_hook(**options[rank]))
    with pytest.raises(AgreementError, match=words):
        model(torch.ones(2, 40)).sum().backward()
    assert time.perf_counter() - start < 10


def another_codec(rank: int, world: int) -> None:
    differ("codec: rank 0 has 'int8:128:bf16', rank 1 has 'int4:128:bf16'", {"bits": 8}, {"bits": 4}, rank=rank)


def another_warm_up(rank: int, world: int) -> None:
    differ(r"settings: .*warm_up=0.*rank 1 has .*warm_up=3", {}, {"warm_up": 3}, rank=rank)


def feedback_here_alone(rank: int, world: int) -> None:
    differ(r"settings: .*error_feedback=False.*error_feedback=True", {}, {"error_feedback": True}, rank=rank)


def the_same_again(rank: int, world: int) -> None:
    """A second hook is compared with the others' second one, whatever the first ones have agreed on."""
    comm.ddp_hook()(None, Bucket(torch.ones(300))).wait()
    hook = comm.ddp_hook(4 if rank else 8)
    with pytest.raises(AgreementError, match="codec: "):
        hook(None, Bucket(torch.ones(300)))
    hook, group = comm.ddp_hook(), comm.eager.group.group_of(None)
    hook(None, Bucket(torch.ones(300))).wait()
    before = group.agreements
    hook(None, Bucket(torch.ones(300))).wait()
    assert group.agreements == before


def no_hook_elsewhere(rank: int, world: int) -> None:
    """A warning soon, and an error before the timeout of the group; both say what may be missing."""
    agreement.WARNS_AFTER, agreement.PATIENCE = 0.3, 1.0
    hook, start = comm.ddp_hook(), time.perf_counter()
    if rank == 1:
        time.sleep(3)
        return
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with pytest.raises(AgreementError) as raised:
            hook(None, Bucket(torch.ones(300)))
    assert time.perf_counter() - start < 3
    assert "ddp_hook waits for ranks [1] of group '0'" in str(said[0].message)
    assert "rank 1 said nothing for 1 s" in str(raised.value)
    assert "register the hook on all ranks" in str(raised.value)
