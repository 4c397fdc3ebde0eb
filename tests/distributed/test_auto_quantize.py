"""qpass's auto_quantize beside torch's, which fails every one of these checks; and dist's every form of call."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

import qpass.comm
from distributed.auto_quantize_defects import DEFECTS
from distributed.two_ranks import two_ranks


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return two_ranks()


@pytest.mark.parametrize("check", DEFECTS)
def test_defects_of_torch(ranks: list[dict[str, Any]], check: str) -> None:
    found = [rank["verdicts"] | rank["torch"] for rank in ranks]
    for name in ("torch", "qpass"):
        print(f"{name:6s} {[rank[name, check] for rank in found]}")
    assert all(rank["qpass", check] == "" for rank in found)
    assert any(rank["torch", check] != "" for rank in found)


@pytest.mark.parametrize(
    "function",
    [
        "all_gather", "all_gather_into_tensor", "all_gather_single", "all_reduce", "all_to_all", "all_to_all_single",
        "broadcast", "reduce_scatter", "reduce_scatter_single", "reduce_scatter_tensor",
    ],
)  # fmt: skip
def test_every_form_of_a_call_does_what_dist_does(ranks: list[dict[str, Any]], function: str) -> None:
    """Bit for bit: in float16, of whole numbers that it holds exactly; the first 0, 1, ... arguments positional."""
    assert [rank["forms"][function] for rank in ranks] == ["", ""]


def test_gradients_are_those_of_torch(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["gradients"]) == 8
        assert all(rank["gradients"].values())


def test_graphs_hold_what_eager_calls_do(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["traceable"]) == 7
        assert all(rank["traceable"].values())


def test_a_function_that_is_no_collective_is_refused() -> None:
    with pytest.raises(qpass.QpassError, match=r"auto_quantize does not know 'all_gather_object'.*did you mean"):
        qpass.comm.auto_quantize(dist.all_gather_object, qpass.comm.DQuantType.FP16)


def test_a_type_by_its_value() -> None:
    assert qpass.comm.DQuantType("int8").codec == qpass.comm.codec("int8")
    with pytest.raises(ValueError, match="int9"):
        qpass.comm.auto_quantize(dist.all_gather, "int9")  # type: ignore[arg-type]
