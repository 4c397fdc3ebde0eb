"""Values that a wrong quantizer gets wrong: ties, and the floats beside them."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS = 512


def hard_values(scale: float) -> Tensor:
    """``[ROWS, ROWS]``: half ordinary, half ties of `scale` or one float beside; large, tiny, signed zeros."""
    x = torch.randn(ROWS * ROWS) * 60 * scale
    ties = ((torch.randint(-300, 300, (x.numel() // 2,)) + 0.5) * scale).float()
    toward = torch.tensor([-torch.inf, torch.inf])[torch.randint(0, 2, ties.shape)]
    x[: len(ties)] = torch.where(torch.rand(len(ties)) < 0.6, torch.nextafter(ties, toward), ties)
    x[-8:] = torch.tensor([3e38, -3e38, 1e30, -1e30, 1e-40, -1e-40, 0.0, -0.0])
    return x[torch.randperm(x.numel())].reshape(ROWS, ROWS)
