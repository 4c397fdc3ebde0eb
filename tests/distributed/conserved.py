"""Error feedback in every way of training with DDP: what was applied and what is kept are the true sums."""

from __future__ import annotations

import contextlib
import copy
import re
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.nn.parallel import DistributedDataParallel

import qpass
from qpass.comm.training.ddp_hooks import DDPHook


class Branches(nn.Module):
    """One of two layers in front of a head; that which is not asked for has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(16, 40, bias=False), nn.Linear(16, 40, bias=False), nn.Linear(40, 3)

    def forward(self, x: Tensor, branch: bool) -> Tensor:
        return self.head((self.a if branch else self.b)(x))


def missing(
    branch: Callable[[int], bool],
    *,
    dtype: torch.dtype = torch.float32,
    accumulate: int = 1,
    set_to_none: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    overflow: Callable[[int], bool] = lambda step: False,
    steps: int = 8,
    hook: dict[str, Any] | None = None,
    **ddp: Any,
) -> float:
    """The largest share of a parameter's true sum that is neither applied nor kept; inf where ranks differ."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = DistributedDataParallel(Branches().to(dtype), bucket_cap_mb=0.001, **ddp)  # a bucket for each parameter
    exact = copy.deepcopy(model.module)
    fed = qpass.comm.ddp_hook(4, error_feedback=True, scaler=scaler, **(hook or {}))
    model.register_comm_hook(None, fed)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    applied, true = ([torch.zeros(p.numel(), dtype=torch.float64) for p in exact.parameters()] for _ in range(2))
    for step in range(steps):
        optimizer.zero_grad(set_to_none)
        exact.zero_grad()
        scale = scaler.get_scale() if scaler is not None else 1.0
        for part in range(accumulate):
            torch.manual_seed(1000 * step + 10 * part + rank)
            x = torch.randn(5, 16, dtype=dtype)
            with model.no_sync() if part < accumulate - 1 else contextlib.nullcontext():
                loss = model(x, branch(step)).square().sum()
                loss = scaler.scale(loss) if scaler is not None else loss
                (loss * float("inf") if overflow(step) else loss).backward()
            exact(x, branch(step)).square().sum().backward()
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() < scale:  # skipped: nothing is applied, and nothing is to be
                continue
        for sums, module in ((applied, model.module), (true, exact)):
            for total, parameter in zip(sums, module.parameters(), strict=True):
                if parameter.grad is not None:  # in units of the loss: the scaler's step has divided it
                    total += parameter.grad.double().flatten()
    for total in true:
        dist.all_reduce(total.div_(world))
    return max(
        ((one - other - kept).norm() / one.norm()).item() if one.any() else 0.0
        for one, other, kept in zip(true, applied, kept_of(fed, model.module), strict=True)
    )


def kept_of(hook: DDPHook, model: nn.Module) -> list[Tensor]:
    """What all ranks keep of each parameter: the mean of their residuals, and those of the rows that each sums."""
    rank, world = dist.get_rank(), dist.get_world_size()
    state, found = hook.state_dict()[f"rank {rank}"], []
    for parameter in model.parameters():
        number = hook._numbers.get(id(parameter))
        kept = torch.zeros(parameter.numel(), dtype=torch.float64)
        if number is not None:
            rows = state["residuals"][number].double().view(-1, hook.codec.row) / world
            if number in state["owned"]:
                rows[(rank - number) % world :: world] += state["owned"][number]
            kept += rows.flatten()[: kept.numel()]
        dist.all_reduce(kept)
        found.append(kept)
    return found


def conserved() -> dict[str, float]:
    """Every way of training -> what is missing."""
    rank = dist.get_rank()
    unused: dict[str, Any] = {"find_unused_parameters": True}

    def mine(step: int) -> bool:
        return bool((step + rank) % 2)

    found = {
        "one branch": missing(lambda step: True, **unused),
        "static graph": missing(lambda step: True, static_graph=True),
        "branches by rank": missing(mine, **unused),
        "warm-up": missing(mine, hook={"warm_up": 3}, **unused),
        "accumulated": missing(mine, accumulate=3, **unused),
        "rotated": missing(mine, hook={"hadamard": True}, **unused),
        "bfloat16": missing(mine, dtype=torch.bfloat16, **unused),
        "float16": missing(mine, dtype=torch.float16, **unused),
    }
    for views in (False, True):
        for set_to_none in (False, True):
            options = {"gradient_as_bucket_view": views, "set_to_none": set_to_none, **unused}
            found[f"no gradient anywhere, {options}"] = missing(lambda step: step % 2 == 0, **options)
    for name, of in {"all": lambda step: step in (2, 5), "one rank": lambda step: rank == 0 and step in (2, 5)}.items():
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, backoff_factor=2.0**-6, growth_interval=2)
        found[f"overflows of {name}"] = missing(mine, scaler=scaler, overflow=of, **unused)
    return found


def states(folder: str) -> dict[str, Any]:
    """What the states of hooks say and refuse."""
    rank, world = dist.get_rank(), dist.get_world_size()

    def made(seed: int) -> DDPHook:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Linear(130, 7))
        hook = qpass.comm.ddp_hook(4, error_feedback=True)
        model.register_comm_hook(None, hook)
        torch.manual_seed(seed + rank)
        model(torch.randn(3, 130)).square().sum().backward()
        return hook

    def refusal(state: dict[str, Any]) -> str:
        try:
            qpass.comm.ddp_hook(4, error_feedback=True).load_state_dict(state)
        except qpass.QpassError as error:
            return str(error)
        return ""

    hook = made(0)
    state = hook.state_dict()
    mine = state[f"rank {rank}"]
    checkpoint.save({"hook": state}, checkpoint_id=folder)
    template = {"hook": made(100).state_dict()}
    was_other = not torch.equal(template["hook"][f"rank {rank}"]["residuals"][0], mine["residuals"][0])
    checkpoint.load(template, checkpoint_id=folder)
    loaded = template["hook"][f"rank {rank}"]
    empty = {"hook": qpass.comm.ddp_hook(4, error_feedback=True).state_dict()}
    checkpoint.load(empty, checkpoint_id=folder)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder)
    of_others = {re.sub(r"rank \d+", f"rank {(rank + 1) % world}", key): value for key, value in state.items()}
    return {
        "through a checkpoint": was_other
        and all(torch.equal(loaded[kind][k], mine[kind][k]) for kind in ("residuals", "owned") for k in mine[kind]),
        "residuals": len(mine["residuals"]),
        "other ranks": refusal({**state, "ranks": 4}),
        "another rank": refusal(of_others),
        "an empty template": refusal(empty["hook"]),
        "no state": refusal({"codec": "int4"}),
    }
