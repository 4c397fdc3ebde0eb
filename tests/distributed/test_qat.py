"""A model prepared for training, under DDP on ranks that see different data."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distributed.qat_training import batches, on_this_rank, prepared, qparams, train
from on_ranks import on_ranks


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return on_ranks(request.param, on_this_rank)


@pytest.mark.parametrize("model", ["plain", "norm"])
def test_ranks_round_alike_to_the_last_bit(ranks: list[dict[str, Any]], model: str) -> None:
    first_qparams, first_codes, _ = ranks[0][model]
    assert len(first_qparams) == 4
    for rank in ranks[1:]:
        other_qparams, other_codes, _ = rank[model]
        for name, pair in first_qparams.items():
            assert all(map(torch.equal, pair, other_qparams[name])), name
        for name, codes in first_codes.items():
            if model == "plain":  # each rank's batch norm has the statistics of its own data, as DDP has it
                assert torch.equal(codes, other_codes[name]), name


def test_and_as_one_process_on_the_union(ranks: list[dict[str, Any]]) -> None:
    found, _, state = ranks[0]["plain"]
    alone = prepared(with_norm=False)
    train(alone, batches())
    expected = qparams(alone)
    for name, (scale, zero_point) in found.items():
        # the weights differ by the rounding of a gradient that is averaged in another order, and their scales with them
        torch.testing.assert_close(scale, expected[name][0], rtol=1e-5, atol=0)
        assert torch.equal(zero_point, expected[name][1])
    torch.testing.assert_close(state["0.weight"], alone.state_dict()["0.weight"], rtol=1e-4, atol=1e-6)


def test_ranks_that_do_not_share_their_statistics_are_told_so_once(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for how in ("warned", "warned compiled"):
            assert len(rank[how]) == 1, how
            assert "synchronize(model)" in rank[how][0]
        assert rank["synchronized"] == []
