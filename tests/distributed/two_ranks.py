"""Everything that needs a group of 2 ranks, in one pair of processes: starting them takes longer than the checks."""

from __future__ import annotations

import functools
from typing import Any

from distributed import auto_quantize_defects, fsdp_training
from distributed.ranks import on_ranks


def everything() -> dict[str, Any]:
    return {
        "verdicts": auto_quantize_defects.verdicts(),
        "forms": auto_quantize_defects.forms(),
        "gradients": auto_quantize_defects.gradients(),
        "fsdp": fsdp_training.figures(),
    }


@functools.cache
def two_ranks() -> list[dict[str, Any]]:
    """What `everything` found, rank by rank."""
    return on_ranks(2, everything)
