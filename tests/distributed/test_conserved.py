"""Error feedback loses nothing: applied averages + residuals = the true sums, for every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distributed.conserved import conserved, states
from on_ranks import on_ranks


@pytest.mark.parametrize("world", [2, 3])
def test_nothing_is_lost(world: int) -> None:
    """float32 residuals of eight steps err by some 1e-8 of the sum; a lost residual is 5 % of it, a wrong unit more.

    An average is rounded to bfloat16 or float16 as the gradient is: that, too, is fed back, else 1e-3 were missing.
    """
    for rank in on_ranks(world, conserved):
        print({name: f"{share:.1e}" for name, share in rank.items()})
        assert len(rank) == 14
        assert all(share < 1e-6 for share in rank.values())


def test_states_belong_to_their_ranks(tmp_path: Path) -> None:
    """`torch.distributed.checkpoint` keeps each rank's; another number of ranks, or another rank, is an error."""
    found: list[dict[str, Any]] = on_ranks(3, states, str(tmp_path / "checkpoint"))
    for rank, said in enumerate(found):
        assert said["through a checkpoint"]
        assert said["residuals"] == 2
        assert "The state is of 4 ranks, and this run has 3" in said["other ranks"]
        assert f"The state is of rank {(rank + 1) % 3}, and this is rank {rank}" in said["another rank"]
        assert "The state is of 2 residuals, and holds 0" in said["an empty template"]
        assert "this is not a state of a DDP hook" in said["no state"]
