"""What runs on each rank: compiled programs whose gradients travel in four bits, with error feedback."""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed import _functional_collectives as funcol
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from compiled_traffic import CompiledTraffic, value
from distributed.compiled_sharding import shard_weights, shards_of
from qpass import comm
from qpass.errors import ConfigError
from ranks import everywhere

INT4 = comm.codec("int4")
STEPS = 32


def fed(feedback: comm.Feedback) -> dict[str, Any]:
    return {"comm": {"codec": INT4, "kinds": ("all_reduce", "reduce_scatter"), "min_bytes": 0, "feedback": feedback}}


def decibel(error: Tensor, reference: Tensor) -> float:
    return 20 * math.log10(float(error.norm() / reference.norm()))


def check_mean(sums: Tensor, exact: Tensor) -> None:
    """Each sum errs as int4 does, and so would the mean of them without feedback; with it, far less."""
    once, mean = decibel(sums[0] - exact, exact), decibel(sums.mean(0) - exact, exact)
    print(f"{len(exact)} elements in int4: {once:.1f} dB, the mean of {len(sums)} sums {mean:.1f} dB", file=sys.stderr)
    assert -30 < once < -15
    assert mean < once - 20  # the last residual, a 32nd of it, is at -30 dB to the error of one


def residuals(feedback: comm.Feedback) -> dict[str, Tensor]:
    return feedback.state_dict()[f"rank {dist.get_rank()}"]["residuals"]


def in_pieces(rank: int, world: int) -> None:
    """Terms that are known, sent in pieces: bit for bit what the definition gives, for three steps.

    A second weight that came by the same graph would share residuals with the first: it is refused, but for inference.
    """
    feedback, shard, residual = comm.Feedback(), nn.Parameter(value(5, 11, 35)), torch.zeros(world, 512)

    def loss(x: Tensor, shard: Tensor) -> Tensor:
        return (funcol.all_gather_tensor_autograd(shard, 0, dist.group.WORLD) * x).sum()

    chunk, comm.wire.partition.CHUNK = comm.wire.partition.CHUNK, 128  # so that small tensors, too, go in pieces
    with CompiledTraffic() as watch:
        compiled = torch.compile(loss, backend="qpass", options=fed(feedback), fullgraph=True)
        for step in range(3):
            x = value(10 * step + rank, world * 11, 35)
            compiled(x, shard).backward()
            sent = F.pad(x.view(world, 385), (0, 127)) + residual  # 385 elements are 4 rows
            decoded = INT4.decode(INT4.encode(sent), sent.numel()).view(world, 512)
            residual = sent - decoded
            terms = [torch.empty_like(decoded) for _ in range(world)]
            dist.all_gather(terms, decoded)
            assert shard.grad is not None
            assert torch.equal(shard.grad.view(-1), sum(term[rank, :385] for term in terms))
            shard.grad = None
    comm.wire.partition.CHUNK = chunk
    (kept,) = residuals(feedback).values()
    assert torch.equal(kept.view(world, 512), residual)
    kernel = "all_to_all of int4:32:bf16 with error feedback, summed, in 4 pieces"
    assert watch.decisions[1].kernel == kernel
    with pytest.raises(ConfigError, match="is run for other parameters than those it was first run for"):
        compiled(x, nn.Parameter(shard.detach()))
    with torch.no_grad():
        assert torch.isclose(compiled(x, nn.Parameter(shard.detach())), loss(x, shard), rtol=1e-5)  # of 1,540 products


def ddp_under_compiled_autograd(rank: int, world: int) -> None:
    """The mean of many sums of one gradient: far nearer to it than each of them; equal on all ranks."""
    comm.eager.schedule.ONE_SHOT_BYTES = 0  # small tensors, too, go in two shots where there are more than two ranks
    torch.manual_seed(0)
    model, feedback, x = nn.Linear(64, 33), comm.Feedback(), value(rank, 8, 64)
    config = torch._dynamo.config.patch(optimize_ddp="python_reducer", compiled_autograd=True)
    found = []
    with CompiledTraffic() as watch, config, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ddp = nn.parallel.DistributedDataParallel(model)
        step = torch.compile(lambda: ddp(x).square().sum().backward(), backend="qpass", options=fed(feedback))
        for _ in range(STEPS):
            ddp.zero_grad()
            step()
            found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    assert len(watch.decisions) == 1
    assert " with error feedback, summed" in watch.decisions[0].kernel, watch.decisions
    is_two_shot = world > 2
    assert sum(watch.after, Counter()) == {"all_gather uint8": 1} | ({"all_to_all uint8": 1} if is_two_shot else {})
    assert list(residuals(feedback)) == ["0/output_0"] + ["0/output_0_sum"] * is_two_shot
    y = 2 * model(x).detach()
    expected = torch.cat([(y.t() @ x).flatten(), y.sum(0)]) / world
    dist.all_reduce(expected)
    check_mean(torch.stack(found), expected)
    sums = everywhere(torch.stack(found))
    assert all(torch.equal(other, sums[0]) for other in sums)


class Averaged(torch.autograd.Function):
    """The same on all ranks, with the average of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return funcol.all_reduce(gradient, "avg", dist.group.WORLD)


class Sums:
    """A shard whose gradient is a sum of all ranks' terms, and a copy whose gradient is their average, both known.

    What is applied, what the ranks keep, and what all sums should have been are float64, in units of the loss.
    """

    def __init__(self, dtype: torch.dtype, scaler: torch.amp.GradScaler, accumulated: int) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.dtype, self.scaler, self.accumulated = dtype, scaler, accumulated
        self.shard, self.copy = nn.Parameter(value(5, 11, 35).to(dtype)), nn.Parameter(value(6, 20, 40).to(dtype))
        self.feedback = comm.Feedback(scaler)
        self.loss = torch.compile(self._loss, backend="qpass", options=fed(self.feedback), fullgraph=True)
        self.applied, self.true = (torch.zeros(385 + 800, dtype=torch.float64) for _ in range(2))

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        gathered = funcol.all_gather_tensor_autograd(self.shard, 0, dist.group.WORLD)
        return (gathered * x).sum() + (Averaged.apply(self.copy) * y).sum()

    def step(self, number: int, overflows: bool = False) -> None:
        scale = self.scaler.get_scale()
        self.shard.grad = self.copy.grad = None
        true = torch.zeros_like(self.true)
        for part in range(self.accumulated):
            seed = 100 * number + 10 * part + self.rank
            x, y = value(seed, self.world * 11, 35).to(self.dtype), value(seed, 20, 40).to(self.dtype)
            of_shard, of_copy = x.double(), y.double()
            dist.all_reduce(of_shard)
            dist.all_reduce(of_copy)
            true += torch.cat([of_shard.view(self.world, 385)[self.rank], of_copy.flatten() / self.world])
            if overflows and self.rank == 0:
                x[0, 0] = y[3, 3] = math.inf
            (self.loss(x, y) * scale).backward()
        assert self.shard.grad is not None
        assert self.copy.grad is not None
        parameter = nn.Parameter(torch.zeros(1))  # another one of the model
        optimizer = torch.optim.SGD([parameter], 0.0)
        self.scaler.scale(parameter.sum() * (math.inf if overflows else 1.0)).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
        if not overflows:
            self.true += true
            self.applied += torch.cat([self.shard.grad.flatten(), self.copy.grad.flatten()]).double() / scale

    def kept(self) -> Tensor:
        found = {("cast" in name, len(one)): one.double() for name, one in residuals(self.feedback).items()}
        of_shard, of_copy = found[False, 1024], found[False, 800]  # 385 elements are 4 rows of 128
        dist.all_reduce(of_shard)
        dist.all_reduce(of_copy)
        kept = torch.cat([of_shard.view(self.world, 512)[self.rank, :385], of_copy / self.world])
        if self.dtype is not torch.float32:
            kept += torch.cat([found[True, 385], found[True, 800]])
        return kept


def nothing_is_lost(folder: str) -> dict[str, float]:
    """The share of the true sums that is neither applied nor kept, where a hundredth of them is kept at least."""
    found = {}
    for dtype, accumulated in ((torch.float32, 2), (torch.bfloat16, 1)):
        factors: dict[str, Any] = {"growth_factor": 4.0, "backoff_factor": 2.0**-5, "growth_interval": 2}
        sums = Sums(dtype, torch.amp.GradScaler("cpu", 2.0**8, **factors), accumulated)
        for step in range(7):
            sums.step(step, overflows=step in (2, 6))
        kept = sums.kept()
        assert kept.norm() > 1e-2 * sums.true.norm()
        found[str(dtype)] = float((sums.true - sums.applied - kept).norm() / sums.true.norm())
    through_a_checkpoint(sums, folder)
    return found


def through_a_checkpoint(sums: Sums, folder: str) -> None:
    """`torch.distributed.checkpoint` keeps the residuals of each rank."""
    saved, mine = sums.feedback.state_dict(), residuals(sums.feedback)
    checkpoint.save({"feedback": saved}, checkpoint_id=folder)
    sums.step(7)
    template = {"feedback": sums.feedback.state_dict()}
    assert not any(torch.equal(residual, mine[name]) for name, residual in residuals(sums.feedback).items())
    checkpoint.load(template, checkpoint_id=folder)
    sums.feedback.load_state_dict(template["feedback"])
    assert all(torch.equal(residual, mine[name]) for name, residual in residuals(sums.feedback).items())
    with pytest.raises(ConfigError, match=r"The state is of 4 ranks, and this run has 2"):
        sums.feedback.load_state_dict({**saved, "ranks": 4})
    empty = {"feedback": comm.Feedback().state_dict()}
    checkpoint.load(empty, checkpoint_id=folder)
    with pytest.raises(ConfigError, match=f"The state is of {len(mine)} residuals, and holds 0"):
        sums.feedback.load_state_dict(empty["feedback"])


class Training:
    """SimpleFSDP over int4 gradients with feedback, compiled; ``folder`` holds what each rank saves."""

    def __init__(self, folder: str) -> None:
        self.rank, world = dist.get_rank(), dist.get_world_size()
        self.file = Path(folder, f"{self.rank}.pt")
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
        shard_weights(self.model, init_device_mesh("cpu", (world,)))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.feedback = comm.Feedback()
        options: Any = {"backend": "qpass", "options": fed(self.feedback), "fullgraph": True}
        self.loss = torch.compile(lambda x: self.model(x).square().mean(), **options)

    def gradients(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        self.loss(x).backward()
        return torch.cat([parameter.grad.to_local().flatten() for parameter in self.model.parameters()])

    def run(self, first: int, last: int) -> Tensor:
        """The weights of this rank after some steps."""
        for step in range(first, last):
            self.gradients(value(10 * step + self.rank, 16, 64))
            self.optimizer.step()
        return torch.cat([shard.flatten() for shard in shards_of(self.model)]).detach().clone()

    def momenta(self) -> list[Tensor]:
        return [self.optimizer.state[parameter]["momentum_buffer"].to_local() for parameter in self.model.parameters()]

    def save(self) -> None:
        state = {"weights": shards_of(self.model), "momenta": self.momenta(), "feedback": self.feedback.state_dict()}
        torch.save(state, self.file)

    def load(self) -> None:
        state = torch.load(self.file, weights_only=True)
        with torch.no_grad():
            for parameter in self.model.parameters():
                self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            tensors = [*shards_of(self.model), *self.momenta()]
            for tensor, saved in zip(tensors, state["weights"] + state["momenta"], strict=True):
                tensor.copy_(saved)
        self.feedback.load_state_dict(state["feedback"])


def trained(folder: str) -> dict[str, Any]:
    """The mean of many gradients; then six steps, saved after three."""
    training = Training(folder)
    x = value(training.rank, 16, 64)
    found = torch.stack([training.gradients(x) for _ in range(STEPS)])
    weights = [parameter.full_tensor().detach().requires_grad_() for parameter in training.model.parameters()]
    F.linear(F.linear(x, weights[0]).relu(), weights[1]).square().mean().backward()
    parts = [torch.empty_like(shard) for shard in shards_of(training.model)]
    for part, weight in zip(parts, weights, strict=True):
        dist.reduce_scatter_tensor(part, weight.grad, op=dist.ReduceOp.AVG)
    check_mean(found, torch.cat([part.flatten() for part in parts]))
    names = list(residuals(training.feedback))
    training.feedback.reset()
    training.run(0, 3)
    training.save()
    return {"names": names, "weights": training.run(3, 6)}


def resumed(folder: str) -> dict[str, Any]:
    """The other three steps, in a new process, by graphs from Inductor's cache; and without what was fed back."""
    training = Training(folder)
    training.load()
    weights = training.run(3, 6)
    cache = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
    training.load()
    training.feedback.reset()
    return {"weights": weights, "cache": cache, "without": training.run(3, 6)}


def everything(folder: str) -> dict[str, Any]:
    rank, world = dist.get_rank(), dist.get_world_size()
    found = trained(folder)
    found["missing"] = nothing_is_lost(f"{folder}/checkpoint")
    in_pieces(rank, world)
    ddp_under_compiled_autograd(rank, world)
    return found
