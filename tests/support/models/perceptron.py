"""A plain multi-layer perceptron."""

from __future__ import annotations

import torch
from torch import nn

from .build import Built, Size, initialise, whole_model


@whole_model
def mlp(size: Size) -> Built:
    """Four square linears, each with a GELU."""
    width, batch = (2048, 128) if size == "full" else (64, 8)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(width, width), nn.GELU())))
    initialise(model)
    with torch.no_grad():
        for linear in model[::2]:
            linear.weight.mul_(1.5)  # what a GELU takes from the variance
    return model, (torch.randn(batch, width),)
