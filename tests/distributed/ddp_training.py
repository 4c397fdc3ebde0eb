"""Small trainings through DDP hooks, measured on every rank of a gloo group."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import qpass.comm
from distributed.auto_quantize_defects import traceable
from distributed.hook_defects import Bucket, verdicts

Hook = Any


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(37, 200), nn.ReLU(), nn.Linear(200, 131), nn.ReLU(), nn.Linear(131, 10)
    return nn.Sequential(*layers).to(dtype)


@dataclass
class Training:
    """A DDP model in `cap` MiB buckets, its hook and optimizer; a step's data depends on its number and the rank."""

    hook: Hook = None
    dtype: torch.dtype = torch.float32
    cap: float = 0.05
    views: bool = False
    step: int = 0
    model: DistributedDataParallel = field(init=False)

    def __post_init__(self) -> None:
        net = network(self.dtype)
        self.model = DistributedDataParallel(net, bucket_cap_mb=self.cap, gradient_as_bucket_view=self.views)
        if self.hook is not None:
            self.model.register_comm_hook(None, self.hook)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)

    def loss(self) -> Tensor:
        data = torch.Generator().manual_seed(1000 * self.step + dist.get_rank())
        x, labels = torch.randn(16, 37, generator=data), torch.randint(10, (16,), generator=data)
        self.step += 1
        return nn.functional.cross_entropy(self.model(x.to(self.dtype)), labels)

    def run(self, steps: int) -> Tensor:
        """The parameters after so many more steps, in one dimension."""
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
        return self.parameters()

    def parameters(self) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])

    def checkpoint(self) -> tuple[Any, ...]:
        states = self.model.module.state_dict(), self.optimizer.state_dict(), self.hook.state_dict()
        return copy.deepcopy((*states, self.step))

    def resume(self, checkpoint: tuple[Any, ...]) -> None:
        model, optimizer, hook, self.step = checkpoint
        self.model.module.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)
        self.hook.load_state_dict(hook)


def is_equal_everywhere(tensor: Tensor) -> bool:
    ranks = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, tensor)
    return all(torch.equal(other, tensor) for other in ranks)


def distances() -> Iterator[tuple[str, Any]]:
    """How far 6 steps end from uncompressed ones, relative; -1 where the ranks end apart."""
    plain = Training().run(6)
    hooks = {
        "int8": qpass.comm.ddp_hook(), "int8 hadamard": qpass.comm.ddp_hook(hadamard=True),
        "int4": qpass.comm.ddp_hook(4, 32), "int4 feedback": qpass.comm.ddp_hook(4, 32, error_feedback=True),
        "bf16": qpass.comm.ddp_hook(format="bf16"), "fp16": qpass.comm.ddp_hook(format="fp16"),
        "per tensor": qpass.comm.quantization_pertensor_hook, "per channel": qpass.comm.quantization_perchannel_hook,
    }  # fmt: skip
    for name, hook in hooks.items():
        parameters = Training(hook, views=name == "int8").run(6)
        error = ((parameters - plain).norm() / plain.norm()).item()
        yield name, error if is_equal_everywhere(parameters) else -1.0
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        plain = Training(None, dtype).run(3).double()
        for name, hook in {"": qpass.comm.ddp_hook(), " feedback": qpass.comm.ddp_hook(error_feedback=True)}.items():
            parameters = Training(hook, dtype, cap=0.05 if name else 0.001).run(3).double()  # one parameter a bucket
            yield f"{dtype}{name}", ((parameters - plain).norm() / plain.norm()).item()


def resumed() -> Iterator[tuple[str, Any]]:
    """Whether a run that was saved after 4 steps and continued in a new model ends where the first run ends."""
    options: dict[str, dict[str, Any]] = {
        "int8": {}, "int4 feedback": {"bits": 4, "error_feedback": True},
        "after warm-up": {"bits": 4, "error_feedback": True, "warm_up": 2},
        "rotated feedback": {"bits": 4, "block": 32, "error_feedback": True, "hadamard": True},
    }  # fmt: skip
    for name, chosen in options.items():
        first = Training(qpass.comm.ddp_hook(**chosen))
        first.run(4)
        checkpoint = first.checkpoint()
        second = Training(qpass.comm.ddp_hook(**chosen))
        second.resume(checkpoint)
        yield name, torch.equal(first.run(4), second.run(4))
        if chosen.get("error_feedback"):
            for lost in ("residuals", "owned"):
                third = Training(qpass.comm.ddp_hook(**chosen))
                key = f"rank {dist.get_rank()}"
                mine = {name: torch.zeros_like(kept) for name, kept in checkpoint[2][key][lost].items()}
                state = {**checkpoint[2], key: {**checkpoint[2][key], lost: mine}}
                third.resume((*checkpoint[:2], state, checkpoint[3]))
                yield f"{name}, {lost} lost", torch.equal(first.parameters(), third.run(4))


def grouping() -> Iterator[tuple[str, Any]]:
    """Whether buckets of another size change anything."""
    runs = [Training(qpass.comm.ddp_hook(4, error_feedback=True), cap=cap).run(4) for cap in (0.02, 25)]
    yield "equal", torch.equal(*runs)


def feedback() -> Iterator[tuple[str, Any]]:
    """Decibels of the error of the mean of 64 steps with the same gradient."""
    torch.manual_seed(dist.get_rank())
    pair = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    gradient, parameter = torch.randn(4000), torch.empty(4000)
    for group in (pair, dist.group.WORLD):
        world = dist.get_world_size(group)
        average = gradient / world
        dist.all_reduce(average, group=group)
        for name, chosen in {"without": False, "with": True}.items():
            hook = qpass.comm.ddp_hook(4, 32, error_feedback=chosen)
            results = [hook(group, Bucket(gradient.clone(), parameter)).wait().clone() for _ in range(64)]
            error = torch.stack(results).mean(0) - average
            yield f"{name}, {world}", 10 * torch.log10(error.square().sum() / average.square().sum()).item()


def overflow() -> Iterator[tuple[str, Any]]:
    """One rank's gradient overflows in the second of four steps: what GradScaler does, and what feedback keeps."""
    for name, hook in {"int8": qpass.comm.ddp_hook(), "feedback": qpass.comm.ddp_hook(4, error_feedback=True)}.items():
        training = Training(hook)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        for step in range(4):
            training.optimizer.zero_grad()
            before = training.parameters()
            loss = scaler.scale(training.loss())
            if step == 1 and dist.get_rank() == 1:
                loss = loss * torch.tensor(3e38)
            loss.backward()
            scaler.step(training.optimizer)
            scaler.update()
            if step == 1:
                yield f"{name}: step skipped", torch.equal(before, training.parameters())
        yield f"{name}: scale", scaler.get_scale()
        yield f"{name}: finite", training.parameters().isfinite().all().item()


def counts() -> Iterator[tuple[str, Any]]:
    """What statistics say, and that warm-up and a fast link send in full."""
    hook = qpass.comm.ddp_hook(measure_error=True)
    Training(hook).run(3)
    yield "steps", hook.statistics.steps
    yield "ratio", hook.statistics.ratio
    yield "plain bytes", hook.statistics.plain_bytes
    yield "error norm", hook.statistics.error_norm
    plain = [Training().run(steps) for steps in (2, 3)]
    warm = [Training(qpass.comm.ddp_hook(4, warm_up=2)).run(steps) for steps in (2, 3)]
    yield "warm-up", [torch.equal(*pair) for pair in zip(plain, warm, strict=True)]
    fast = qpass.comm.Link(bandwidth=1e12, latency=1e-6, encode=1e9, decode=1e9)
    yield "declined", torch.equal(plain[1], Training(qpass.comm.ddp_hook(4, link=fast)).run(3))
    slow = qpass.comm.Link(bandwidth=1e6, latency=1e-6, encode=1e9, decode=1e9)
    yield "accepted", not torch.equal(plain[1], Training(qpass.comm.ddp_hook(4, link=slow)).run(3))
    try:
        qpass.comm.ddp_hook(4).load_state_dict(hook.state_dict())
    except qpass.QpassError as error:
        yield "another codec", str(error)


def figures() -> dict[str, dict[str, Any]]:
    """Everything above, on this rank."""
    return {run.__name__: dict(run()) for run in (distances, resumed, grouping, feedback, overflow, counts)}


def everything() -> dict[str, Any]:
    """All that needs 4 ranks, in one group of processes: starting them takes longer than the checks."""
    return {"verdicts": verdicts(), "figures": figures(), "traceable": traceable()}
