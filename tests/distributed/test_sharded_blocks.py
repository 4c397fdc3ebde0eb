"""Compiled blocks between ranks: weights that FSDP gathers anew, parts of a graph that DDP's optimizer cuts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distributed import sharded_blocks
from on_ranks import on_ranks

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    return on_ranks(2, sharded_blocks.figures, timeout=500)


WAYS = ["fsdp", "fsdp in inference mode", "fsdp without resharding"]


# Rounding to 8 bits leaves 40 dB of three blocks; another block's biases, or those before the change, less than 10.
# Parameters that travel in int8 cost 10 dB more.
@pytest.mark.parametrize(("way", "least"), [*((way, 35) for way in WAYS), ("compressed", 25)])
def test_blocks_under_fsdp_compute_with_their_own_weights(
    measured: list[dict[str, Any]], way: str, least: float
) -> None:
    for rank in measured:
        assert min(rank[way]["dB"]) > least, rank[way]
        assert rank[way]["graphs"] == 1


@pytest.mark.parametrize("way", ["ddp", "trained ddp"])
def test_parts_of_a_graph_under_ddp_are_lowered_and_follow_their_weights(
    measured: list[dict[str, Any]], way: str
) -> None:
    for rank in measured:
        assert min(rank[way]["dB"]) > 35, rank[way]
        assert rank[way]["lowered"] == 4
        assert rank[way]["graphs"] >= 2


def test_with_comm_alone_the_parts_stay_float_and_are_reported(measured: list[dict[str, Any]]) -> None:
    for rank in measured:
        assert min(rank["ddp with comm"]["dB"]) > 100
        assert rank["ddp with comm"]["stage"] == "compiled"
