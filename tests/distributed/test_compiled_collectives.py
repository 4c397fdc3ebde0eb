"""Programs with collectives, compiled with `backend="qpass"` on two real ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import ranks

PROGRAMS = ["user_function", "tensor_parallel", "sharded_training"]


@functools.cache
def results() -> dict[str, list[str]]:
    return ranks.run(str(Path(__file__).with_name("compiled_programs.py")), 2, PROGRAMS, timeout=120)


@pytest.mark.parametrize("program", PROGRAMS)
def test_on_two_ranks(program: str) -> None:
    assert results()[program] == [ranks.OK] * 2
