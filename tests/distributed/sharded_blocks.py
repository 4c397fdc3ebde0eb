"""What compiled blocks compute on two ranks, under FSDP2 and under DDP, beside what they compute in float alone."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import qpass
from live_blocks import decibels

WIDTH = 32


class Block(nn.Module):
    def __init__(self, level: float) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        for parameter in (self.norm.weight, self.norm.bias, self.linear.bias):
            nn.init.normal_(parameter, level)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(self.norm(x))


def network() -> nn.Sequential:
    """Blocks of one kind, told apart by what stays float in them."""
    torch.manual_seed(0)
    return nn.Sequential(*(Block(3.0 * index) for index in range(3)))


def batch() -> Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs: list[int] = []
    yield graphs
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def fsdp(reshard: bool, mode: Callable[[], Any], compress: bool = False) -> dict[str, Any]:
    """Evaluations of compiled blocks, before and after steps of training that move one row of a weight alone."""
    with counted() as graphs:
        model, mesh = network(), init_device_mesh("cpu", (2,))
        plain = copy.deepcopy(model)
        for block in model:
            fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
        if compress:
            qpass.comm.compress_fsdp(model)
        for block in model:
            block.compile(backend="qpass")
        found = [evaluated(plain, model, mode) for _ in range(2)]
        for step in (0, 1):
            for unit in (model, *model):
                unit.reshard()
            with torch.no_grad():
                for block in model:
                    # What an optimizer does: it writes the rank's own part, and the next forward gathers all of them.
                    block.linear.bias.to_local()[-1:].add_(20 + step)
                    block.linear.weight.to_local()[:1].mul_(-5)
                parts = [parameter.full_tensor() for parameter in model.parameters()]
                for own, part in zip(plain.parameters(), parts, strict=True):
                    own.copy_(part)
            found.append(evaluated(plain, model, mode))
    return {"dB": found, "graphs": graphs[0]}


def evaluated(plain: nn.Module, model: nn.Module, mode: Callable[[], Any]) -> float:
    with mode():
        return decibels(plain(batch()), model(batch()))


FEATURES = 400  # a layer has 0.64 MB, and the smallest bucket 1 MB


class Wide(nn.Module):
    """More than one bucket of DDP, so that Dynamo's optimizer for DDP cuts the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(FEATURES), nn.Linear(FEATURES, 8)
        self.register_buffer("shift", torch.full((FEATURES,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu() + self.shift
        return self.head(self.norm(x))


def ddp(trains: bool, **options: Any) -> dict[str, Any]:
    """Evaluations of a compiled DDP model of several buckets, and its report."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = DistributedDataParallel(Wide(), bucket_cap_mb=1.1)
    compiled = torch.compile(model, backend="qpass", **options)
    x = torch.randn(4, FEATURES, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if trains:
            compiled(x).square().mean().backward()
        found = [decibels_of(model, compiled, x)]
        with torch.no_grad():
            for layer in model.module.layers:
                layer.bias.add_(3)
            model.module.norm.bias.data = torch.full((FEATURES,), 5.0)
            model.module.head.weight.mul_(-1)
        found.append(decibels_of(model, compiled, x))
    report = qpass.report(compiled)
    return {"dB": found, "lowered": report.count("lowered"), "graphs": report.graphs, "stage": report.stage}


def decibels_of(model: nn.Module, compiled: Callable[..., Tensor], x: Tensor) -> float:
    with torch.no_grad():
        return decibels(model.module(x), compiled(x))


def figures() -> dict[str, Any]:
    return {
        "fsdp": fsdp(True, torch.no_grad),
        "fsdp in inference mode": fsdp(True, torch.inference_mode),
        "fsdp without resharding": fsdp(False, torch.no_grad),
        "compressed": fsdp(True, torch.no_grad, compress=True),
        "ddp": ddp(trains=False),
        "trained ddp": ddp(trains=True),
        "ddp with comm": ddp(trains=True, options={"comm": "int8"}),
    }
