"""Small trainings of 40 steps on 4 ranks; each yields the tensors that several ranks hold, and the group that does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import qpass.comm
from distributed.compiled_sharding import shard_weights

STEPS = 40
"""Enough for what differs by one code in a step to grow: a rounded parameter feeds back into all that follow."""

Held = Iterator[tuple[str, Tensor, Any]]


class Block(nn.Module):
    """Of width 32: no parameter but the two matrices fills a row of 128, so a row of the flat buffer mixes them.

    What is replicated is small beside the matrices, and so is its gradient: it would be rounded by their scale.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)
        nn.init.normal_(self.norm.weight, 0.05, 0.01)
        with torch.no_grad():
            self.down.weight /= 16

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(16 * self.up(self.norm(x)).relu())


def blocks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(2)))


def train(model: Callable[[Tensor], Tensor], parameters: Any, part: int) -> None:
    """`part` is the number of this rank's share of the data."""
    optimizer = torch.optim.SGD(parameters, 0.1, foreach=False)
    for step in range(STEPS):
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(77 * step + part))
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def over_tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    for block in model.children():
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def held_twice(model: nn.Module) -> Held:
    """Each parameter's own part, with the group of every dimension of its mesh over which it is replicated."""
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            yield name, parameter, None
            continue
        mesh = parameter.device_mesh
        for dimension, placement in enumerate(parameter.placements):
            if placement.is_replicate() and mesh.size(dimension) > 1:
                yield f"{name} over {dimension}", parameter.to_local(), mesh.get_group(dimension)


def ddp(hook: Any) -> Held:
    model = DistributedDataParallel(blocks(), bucket_cap_mb=0.01)
    model.register_comm_hook(None, hook)
    train(model, model.parameters(), dist.get_rank())
    yield from held_twice(model)


def fsdp(mesh: DeviceMesh, tensor_parallel: DeviceMesh | None = None, part: int | None = None, **how: Any) -> Held:
    model = blocks()
    if tensor_parallel is not None:
        over_tensor_parallel(model, tensor_parallel)
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    done = qpass.comm.compress_fsdp(model, **how)
    train(model, model.parameters(), dist.get_rank() if part is None else part)
    yield from held_twice(model)
    for name, parameter in model.named_parameters():  # what the other dimensions replicate: every rank's whole tensor
        yield f"all of {name}", parameter.full_tensor(), None  # type: ignore[attr-defined]
    if tensor_parallel is not None:
        x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        yield "output", model(x).detach(), tensor_parallel.get_group()
    assert done.statistics.ratio > 2
    assert not any(entry.missed for entry in done.entries), done.entries


def compiled(model: nn.Module, part: int) -> None:
    torch._dynamo.reset()
    options = {"comm": qpass.comm.Policy("int8", min_bytes=0)}
    train(torch.compile(model, backend="qpass", options=options), model.parameters(), part)


def tensor_parallel() -> Held:
    model, mesh = blocks(), init_device_mesh("cpu", (4,))
    over_tensor_parallel(model, mesh)
    compiled(model, 0)
    names = {"norm.weight", "norm.bias", "down.bias"}  # those of the norm are no DTensors, the bias of `down` is one
    replicas = [(name, *rest) for name, *rest in held_twice(model) if name.split(" ")[0].split(".", 1)[1] in names]
    assert len(replicas) == 6
    yield from replicas


def simple_fsdp() -> Held:
    """Weights that are sharded, and gathered by a parametrization."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48, bias=False), nn.ReLU(), nn.Linear(48, 32, bias=False))
    shard_weights(model, init_device_mesh("cpu", (4,)))
    compiled(model, dist.get_rank())
    for name, parameter in model.named_parameters():
        yield name, parameter.full_tensor(), None  # type: ignore[attr-defined]
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    yield "output", model(x).detach(), None


def differing(held: Held) -> list[str]:
    """What is not equal bit for bit on all ranks of its group."""
    wrong, count = [], 0
    for name, tensor, group in held:
        own, count = tensor.detach().contiguous(), count + 1
        others = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
        dist.all_gather(others, own, group=group)
        if not all(torch.equal(other.view(torch.uint8), own.view(torch.uint8)) for other in others):
            wrong.append(f"{name}, by {max((other - own).abs().max().item() for other in others):.1e}")
    assert count > 0
    return wrong
