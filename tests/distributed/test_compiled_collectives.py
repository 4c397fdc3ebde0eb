"""Programs with collectives, compiled with `backend="qpass"` on real ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import ranks

FILE = str(Path(__file__).with_name("compiled_programs.py"))
PROGRAMS = ["user_function", "in_pieces", "tensor_parallel", "sharded_training", "ddp_under_compiled_autograd"]
PROGRAMS += ["ranks_that_decide_differently"]


@functools.cache
def results() -> dict[str, list[str]]:
    return ranks.run(FILE, 2, PROGRAMS, timeout=120)


@pytest.mark.parametrize("program", PROGRAMS)
def test_on_two_ranks(program: str) -> None:
    assert results()[program] == [ranks.OK] * 2


@pytest.mark.slow
def test_on_four_ranks() -> None:
    assert ranks.run(FILE, 4, ["many_ranks"], timeout=120)["many_ranks"] == [ranks.OK] * 4
