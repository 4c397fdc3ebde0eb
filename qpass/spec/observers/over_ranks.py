"""what each process saw -> what all of them saw: statistics reduced over a process group, so that ranks agree.

Functional collectives on a group's name: they are traced like any operator, and a module that holds a name can be
copied and pickled, which a process group cannot.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def extrema_over_ranks(low: Tensor, high: Tensor, left_out: Tensor, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest `low`, the largest `high` and the sum of `left_out`, by one collective. Every rank must call it."""
    from qpass.torch_private import functional_collectives as collectives

    packed = torch.cat([low.flatten().double(), high.flatten().double(), left_out.reshape(1).double()])
    gathered = collectives.all_gather_single(packed[None], 0, group)
    gathered = collectives.wait_tensor(gathered)
    lows, highs, counts = gathered.split([low.numel(), high.numel(), 1], dim=1)
    total = counts.sum().to(torch.int64)
    return lows.amin(0).float().reshape(low.shape), highs.amax(0).float().reshape(high.shape), total


def sum_over_ranks(counts: Tensor, group: Any) -> Tensor:
    """The sum of an integer tensor. Every rank must call it."""
    from qpass.torch_private import functional_collectives as collectives

    total: Tensor = collectives.wait_tensor(collectives.all_reduce(counts, "sum", group))
    return total
