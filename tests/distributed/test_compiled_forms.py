"""Collectives of every form and of models with DTensors, compiled with `backend="qpass"` on real ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import ranks

PROGRAMS = {
    "compiled_forms.py": (
        "mixture_of_experts",
        "lists_of_tensors",
        "outputs",
        "quantized_values",
        "static_beside_symbolic",
    ),
    "compiled_sharding.py": ("simple_fsdp", "cast_to_float8", "joined"),
}
CASES = [(file, program) for file, programs in PROGRAMS.items() for program in programs]


@functools.cache
def results(file: str) -> dict[str, list[str]]:
    return ranks.run(str(Path(__file__).with_name(file)), 2, list(PROGRAMS[file]), timeout=300)


@pytest.mark.parametrize(("file", "program"), CASES)
def test_on_two_ranks(file: str, program: str) -> None:
    assert results(file)[program] == [ranks.OK] * 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "program", "world"),
    [
        ("compiled_forms.py", "changing_sizes", 2), ("compiled_sharding.py", "simple_fsdp_in_float32", 2),
        ("compiled_sharding.py", "two_meshes", 4), ("compiled_sharding.py", "joined", 4),
    ],
)  # fmt: skip
def test_that_takes_longer(file: str, program: str, world: int) -> None:
    found = ranks.run(str(Path(__file__).with_name(file)), world, [program], timeout=120)
    assert found[program] == [ranks.OK] * world
