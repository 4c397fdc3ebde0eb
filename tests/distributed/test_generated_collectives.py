"""Programs that nobody thought of, on real ranks: none hangs, ranks agree, results are those of the q/dq graph."""

from __future__ import annotations

from pathlib import Path

import pytest

import ranks

FILE = str(Path(__file__).with_name("generated_collectives.py"))


def test_some_on_two_ranks() -> None:
    assert ranks.run(FILE, 2, ["some"], timeout=60)["some"] == [ranks.OK] * 2


@pytest.mark.slow
def test_200_on_two_ranks() -> None:
    assert ranks.run(FILE, 2, ["many"], timeout=120)["many"] == [ranks.OK] * 2
