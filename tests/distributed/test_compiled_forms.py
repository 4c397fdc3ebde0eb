"""Collectives of every form and of models with DTensors, compiled with `backend="qpass"` on real ranks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

import ranks

PROGRAMS = {
    "compiled_forms.py": ("changing_sizes", "mixture_of_experts", "lists_of_tensors", "quantized_values"),
    "compiled_sharding.py": ("simple_fsdp", "cast_to_float8"),
}
CASES = [(file, program) for file, programs in PROGRAMS.items() for program in programs]


@functools.cache
def results(file: str) -> dict[str, list[str]]:
    return ranks.run(str(Path(__file__).with_name(file)), 2, list(PROGRAMS[file]), timeout=120)


@pytest.mark.parametrize(("file", "program"), CASES)
def test_on_two_ranks(file: str, program: str) -> None:
    assert results(file)[program] == [ranks.OK] * 2


@pytest.mark.slow
def test_two_meshes_on_four_ranks() -> None:
    file = str(Path(__file__).with_name("compiled_sharding.py"))
    assert ranks.run(file, 4, ["two_meshes"], timeout=120)["two_meshes"] == [ranks.OK] * 4
