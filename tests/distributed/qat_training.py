"""What each rank does in test_qat.py: train a prepared model on its own part of every batch, under DDP."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qpass
from qpass.fake_quantize import FakeQuantizeBase
from qpass.presets import int8_qat
from qpass.spec.fake_quantize import synchronize

ROWS, STEPS = 8, 3


def prepared(with_norm: bool) -> nn.Module:
    """The same on every rank: a convolution, with or without a batch norm, and a linear."""
    torch.manual_seed(3)
    norm = nn.BatchNorm2d(4) if with_norm else nn.Identity()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).train()
    return qpass.prepare(model, (torch.randn(2, 3, 6, 6),), config=int8_qat(compute_dtype=None))


def batches() -> list[Tensor]:
    """One batch a step, of all ranks together; the ranks' parts have very different ranges."""
    generator = torch.Generator().manual_seed(7)
    widths = torch.arange(1, ROWS + 1).reshape(-1, 1, 1, 1)
    return [torch.randn(ROWS, 3, 6, 6, generator=generator) * widths for _ in range(STEPS)]


def train(model: nn.Module, parts: list[Tensor]) -> None:
    """SGD, whose mean of gradients over ranks is the gradient of the mean over the union."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for part in parts:
        optimizer.zero_grad()
        (model(part) - 1).square().mean().backward()
        optimizer.step()


def qparams(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name.removeprefix("module."): (module.scale.clone(), module.zero_point.clone())
        for name, module in model.named_modules() if isinstance(module, FakeQuantizeBase)
    }  # fmt: skip


def warnings_of(call: Callable[[], Any]) -> list[str]:
    """What `call` warned of that has to do with ranks."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call()
    return [str(warning.message) for warning in caught if "rank" in str(warning.message)]


def on_this_rank() -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found: dict[str, Any] = {"warned": warnings_of(lambda: prepared(False)(batches()[0]))}
    compiled = torch.compile(prepared(False), backend="eager", fullgraph=True)
    found["warned compiled"] = warnings_of(lambda: compiled(batches()[0]))
    for with_norm in (False, True):
        model = synchronize(prepared(with_norm))
        parallel, parts = DistributedDataParallel(model), [batch.chunk(world)[rank] for batch in batches()]
        found["synchronized"] = warnings_of(partial(train, parallel, parts))
        codes = {key: value for key, value in qpass.convert(model).state_dict().items() if key.endswith("codes")}
        found["norm" if with_norm else "plain"] = qparams(model), codes, model.state_dict()
    return found
