"""Rows are divided alike by the eager schedule, the form that Dynamo traces and the rule of the compiler."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qpass.comm
from qpass.comm.eager import schedule
from qpass.comm.wire import partition as module
from qpass.comm.wire.codec import NAMES, Codec, codec
from qpass.comm.wire.partition import cut, partition, pieces_of

SIZES = [0, 1, 127, 128, 129, 767, 768, 1000, 4096, 100_001]


def test_six_rows_of_four_ranks() -> None:
    found = partition(6 * 128 - 5, 4, codec("int8"))
    assert (found.share_rows, found.share, found.numel) == (2, 256, 1024)
    assert (found.share_bytes, found.payload_bytes) == (260, 1040)
    assert [found.owned(rank, 763) for rank in range(4)] == [
        range(256), range(256, 512), range(512, 763), range(763, 763)
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_shares_hold_every_element_once_in_as_few_rows_as_are_equal(name: str, parts: int) -> None:
    how = codec(name)
    for numel in SIZES:
        found = partition(numel, parts, how)
        owned = [found.owned(part, numel) for part in range(parts)]
        assert [index for part in owned for index in part] == list(range(numel))
        assert all(part.start % how.row == 0 for part in owned if part)
        assert found.numel >= numel > found.numel - parts * how.row - how.row or numel == found.numel == 0
        assert found.payload_bytes == how.payload_bytes(found.numel) == parts * found.share_bytes


@pytest.mark.parametrize("how", [codec("int8"), codec("int4"), Codec("fp32"), Codec("int8", block=100_000)])
def test_pieces_are_whole_rows_and_none_is_empty(how: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 500)
    for numel in range(1, 6000, 37):
        found = cut(numel, pieces_of(numel, how), how)
        assert len(found) <= module.CHUNKS
        assert [range(*ends) for ends in found] == schedule.chunks(numel, how)
        assert all(start < stop and start % how.row == 0 for start, stop in found)
        assert [start for start, _ in found[1:]] == [stop for _, stop in found[:-1]]
        assert (found[0][0], found[-1][1]) == (0, numel)
    assert schedule.chunks(0, how) == []


def test_the_three_forms_of_a_sum_ask_it_and_no_other_file_rounds_up_to_rows() -> None:
    """`-(-numel // row)` and `(numel + (world - 1)) // world` stood in each of them, and must stay equal in all."""
    folder = Path(qpass.comm.__file__).parent
    sources = {file.relative_to(folder).as_posix(): file.read_text() for file in folder.rglob("*.py")}
    asking = {name for name, source in sources.items() if "comm.wire.partition import" in source}
    assert asking >= {"eager/schedule.py", "eager/traced.py", "graph/pieces.py", "graph/rules/all_reduce.py"}
    others = {name: source for name, source in sources.items() if not name.startswith("wire/")}
    found = [
        f"{name}:{node.lineno}: {text}" for name, source in others.items() for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv) and (text := ast.unparse(node))
        and (("row" in text and text.startswith("-")) or "world - 1" in text)
    ]  # fmt: skip
    assert found == []


def test_bytes_of_two_shots_are_those_that_the_rule_sends() -> None:
    """770 elements are 7 rows of int8: 2 for each of 4 ranks, one of them padding."""
    how = codec("int8")
    assert schedule.two_shot_bytes(770, how, 4) == 4 * 2 * how.width == partition(770, 4, how).payload_bytes
