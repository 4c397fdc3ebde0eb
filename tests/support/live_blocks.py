"""Small blocks that one compiled graph serves, and every way to change what they hold."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

ROWS, WIDTH = 6, 16

LEAST = 25.0
"""dB. Rounding to 8 bits leaves 30 dB and more of these blocks."""

SHOWS = 20.0
"""dB that a change leaves at most of what was before: a block that does not see it stays below LEAST."""


class Block(nn.Module):
    """Everything that stays float is large: a bias, norm or buffer that is not this block's own shows at once."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)  # siblings: one GEMM of joined constants
        self.norm, self.batch = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.table = nn.Embedding(ROWS, WIDTH)
        self.pair = nn.Parameter(torch.empty(2, WIDTH))
        self.first = self.pair.data[0]  # an attribute that is a view of a parameter
        self.register_buffer("offset", torch.empty(WIDTH))
        self.register_buffer("passing", torch.empty(WIDTH), persistent=False)
        fill(self)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch(self.up(x)).relu() + self.table.weight
        y = self.norm(self.down(y)) + self.pair[1] * self.offset + self.passing
        return self.q(y) + self.k(y).relu() + self.first


@torch.no_grad()
def fill(module: nn.Module) -> None:
    """Other values for all that a module holds."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.dtype.is_floating_point:
            tensor.copy_(other(name, tensor))


def other(name: str, like: Tensor) -> Tensor:
    """A value for the tensor of this name: large where it stays float."""
    value = torch.randn(like.shape, dtype=like.dtype) * (0.3 if like.dim() == 2 and "table" not in name else 2)
    return value.abs() + 0.5 if "running_var" in name else value


def state(block: nn.Module) -> dict[str, Tensor]:
    """Another state dict for a block."""
    found = block.state_dict()
    return {name: other(name, value) if value.dtype.is_floating_point else value for name, value in found.items()}


def replace(module: nn.Module, name: str) -> None:
    value: Any = getattr(module, name)
    new = other(name, value)
    setattr(module, name, nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new)


def step(block: nn.Module) -> None:
    """A step of gradient descent; frozen parameters are set free for it."""
    free = [parameter.requires_grad for parameter in block.parameters()]
    with torch.inference_mode(False), torch.enable_grad():
        block.requires_grad_(True)
        optimizer = torch.optim.SGD(block.parameters(), 3.0)
        block(torch.randn(ROWS, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for parameter, was in zip(block.parameters(), free, strict=True):
        parameter.requires_grad_(was)


def swap(block: Block) -> None:
    for owner, name in ((block.up, "weight"), (block.down, "bias"), (block.norm, "weight")):
        value = getattr(owner, name)
        torch.utils.swap_tensors(value, nn.Parameter(other(name, value), value.requires_grad))


def reallocate(block: Block) -> None:
    """Free a bias and ask for memory of that size until the address is handed out again, or a hundred times."""
    address, shape = block.up.bias.data_ptr(), block.up.bias.shape
    block.up.bias = None  # type: ignore[assignment]
    tried = [torch.empty(shape) for _ in range(100)]
    found = next((tensor for tensor in tried if tensor.data_ptr() == address), tried[0])
    block.up.bias = nn.Parameter(found.normal_(std=2), block.norm.weight.requires_grad)


def round_trip(block: Block) -> None:
    """Through another dtype, which replaces the memory of every parameter."""
    fill(block)
    block.to(torch.float64).to(torch.float32)
    block.first = block.pair.data[0]


def set_data(block: Block) -> None:
    for tensor in (block.down.bias, block.norm.bias, block.q.weight, block.table.weight, block.offset):
        tensor.data = other("", tensor.data)


def exchange(block: Block) -> None:
    """Two weights and two biases change places."""
    block.q.weight, block.k.weight = block.k.weight, block.q.weight
    block.up.bias, block.down.bias = block.down.bias, block.up.bias


CHANGES: dict[str, Callable[[Block], Any]] = {
    "loaded": lambda block: block.load_state_dict(state(block)),
    "loaded by assignment": lambda block: block.load_state_dict(state(block), assign=True),
    "a weight replaced": lambda block: replace(block.up, "weight"),
    "a bias replaced": lambda block: replace(block.down, "bias"),
    "a sibling's bias replaced": lambda block: replace(block.k, "bias"),
    "a norm replaced": lambda block: replace(block.norm, "weight"),
    "a running mean replaced": lambda block: replace(block.batch, "running_mean"),
    "a buffer replaced": lambda block: replace(block, "offset"),
    "a passing buffer replaced": lambda block: replace(block, "passing"),
    "a table replaced": lambda block: replace(block.table, "weight"),
    "a layer replaced": lambda block: setattr(block, "down", fresh(block.down)),
    "data replaced": set_data,
    "written in place": fill,
    "written as one vector": lambda block: vector_to_parameters(
        torch.randn_like(parameters_to_vector(block.parameters())), block.parameters()
    ),
    "a view written": lambda block: block.first.fill_(7),
    "trained": step,
    "swapped": swap,
    "exchanged": exchange,
    "another dtype and back": round_trip,
    "freed, and the address used again": reallocate,
}


def fresh(layer: nn.Module) -> nn.Module:
    """A layer of the same kind with parameters of its own."""
    new = copy.deepcopy(layer)
    fill(new)
    return new


def decibels(reference: Tensor, value: Tensor) -> float:
    noise = (reference - value).double().square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / noise))
