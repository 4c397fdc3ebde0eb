"""States that differ by rank: the part of a rank lies under a key that names it, beside the number of ranks.

    {"ranks": 4, "rank 2": mine}

`torch.distributed.checkpoint` keeps one value for each key, so it keeps the parts of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from qpass.errors import ConfigError


def rank_and_ranks() -> tuple[int, int]:
    """This process among those of the default process group; alone without one."""
    is_one_of_several = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if is_one_of_several else (0, 1)


def state_of_rank(mine: dict[str, Any]) -> dict[str, Any]:
    """The state whose part of this rank is ``mine``."""
    rank, ranks = rank_and_ranks()
    return {"ranks": ranks, f"rank {rank}": mine}


def own_state(state: Mapping[str, Any], owner: str, new: str) -> dict[str, Any]:
    """What `state_of_rank` was given, on the same rank of as many ranks.

    Args:
        state: of an ``owner``, in words.
        new: what to begin with on another number of ranks.

    Raises:
        ConfigError: it is not such a state, or was saved on another number of ranks, or on another rank.
    """
    rank, ranks = rank_and_ranks()
    whose = [key for key in state if isinstance(key, str) and key.startswith("rank ")]
    if "ranks" not in state or not whose:
        raise ConfigError(f"this is not a state of {owner}", hint=f"load what state_dict() of {owner} gave")
    if state["ranks"] != ranks:
        raise ConfigError(
            f"The state is of {state['ranks']} ranks, and this run has {ranks}",
            hint=f"load it on as many ranks, or begin with {new}: what rounding took from one step is lost",
        )
    if f"rank {rank}" not in state:
        raise ConfigError(f"The state is of {whose[0]}, and this is rank {rank}", hint="load each rank's own")
    return state[f"rank {rank}"]


def check_complete(found: int, saved: int) -> None:
    """Refuse a state that holds other than as many residuals as were saved.

    Raises:
        ConfigError: it does.
    """
    if found != saved:
        raise ConfigError(
            f"The state is of {saved} residuals, and holds {found}",
            hint="torch.distributed.checkpoint loads what exists: make a step before that",
        )
