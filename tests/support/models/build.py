"""What every model builder shares: seeding, initialisation, batch-norm statistics, other inputs of the same kind."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Size = Literal["tiny", "full"]
Inputs = tuple[Tensor, ...]
Built = tuple[nn.Module, Inputs]

MODELS: dict[str, Callable[[Size], Built]] = {}


def fresh_inputs(example_inputs: Inputs, seed: int) -> Inputs:
    """Other inputs of the same shapes, dtypes, memory formats and distribution.

    Floats are standard normal; token ids are uniform up to the largest one in the example.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.empty_like(x).normal_(generator=generator)
        if x.is_floating_point()
        else torch.randint(int(x.max()) + 1, x.shape, dtype=x.dtype, generator=generator)
        for x in example_inputs
    )


def whole_model(build: Callable[[Size], Built]) -> Callable[[Size], Built]:
    @functools.wraps(build)
    def seeded(size: Size = "tiny") -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model, inputs = build(size)
            return model.eval(), inputs

    MODELS[build.__name__] = seeded
    return seeded


def initialise(model: nn.Module) -> None:
    """Weights that keep the variance of their input (Glorot's fan-in rule) and uneven norm gains."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.05)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LayerNorm):
            with torch.no_grad():
                module.weight.copy_(torch.exp(0.3 * torch.randn_like(module.weight)))
        elif isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)


def settle_batch_norm(model: nn.Module, inputs: Inputs, forwards: int = 3) -> None:
    """Set every batch norm's running statistics to the average over a few forwards of fresh inputs."""
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.momentum = None  # a cumulative average
    model.train()
    with torch.no_grad():
        for seed in range(forwards):
            model(*fresh_inputs(inputs, seed=100 + seed))
    for norm in norms:
        norm.momentum = 0.1
