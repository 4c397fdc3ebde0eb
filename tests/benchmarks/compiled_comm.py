"""Compiled programs with collectives, and the time that they spend on these; `comm.py --compiled` runs it on ranks.

Time in communication is the time of a step less that of the same program, compiled by Inductor, on a group whose
transfers do nothing and take no time (torch's "fake" backend; two processes side by side as on the link). Codecs are
therefore part of it. The eager schedules are timed by themselves: the collectives of the same program, one after the
other as the program sends them, by `qpass.comm`. All systems take turns, and each is given by its fastest turn, since
whatever else runs on the machine can only add to a time.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from qpass import comm

sys.path.append(str(Path(__file__).resolve().parents[2] / "examples"))
from tensor_parallel import Block, parallel
from train_simple_fsdp import shard

SIZES = {"TP block": (16, 512, 256), "SimpleFSDP step": (1, 64, 1024), "SimpleFSDP step, small": (1, 64, 192)}
"""Batch, length and width: little to compute for what is sent, so that its noise does not hide what is measured."""

SMALL = ("SimpleFSDP step, small",)
"""Programs whose parameters are so small that it is the number of transfers that costs: sent together, and apart."""

LEAST = 1 << 16  # bytes from which a policy compresses
WARM_UP = 4  # turns that are not counted: the first ones compile, and touch memory for the first time
SILENT = ", nothing sent"  # behind the name of a system: its group only pretends to send


def step_of(case: str, **options: Any) -> Callable[[], Any]:
    """The program, compiled with these options of ``torch.compile``; a call is one step."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = torch.randn(SIZES[case])
    width = SIZES[case][-1]
    if case == "TP block":
        compiled = torch.compile(parallel(Block(width).eval().requires_grad_(False), mesh), fullgraph=True, **options)
        return torch.no_grad()(lambda: compiled(x))
    model = shard(Block(width), mesh)
    compiled = torch.compile(model, fullgraph=True, **options)

    def step() -> None:
        model.zero_grad()
        compiled(x).square().mean().backward()

    return step


def eager(case: str) -> Callable[[], Any]:
    """The collectives of the program alone, by `qpass.comm`, in its order; small ones as torch sends them."""
    world = dist.get_world_size()
    if case == "TP block":
        x = torch.randn(SIZES[case])
        return lambda: [comm.all_reduce(x, codec="int8") for _ in range(2)]
    wholes = [torch.randn(parameter.shape) for parameter in Block(SIZES[case][-1]).parameters()]
    parts = [whole.chunk(world)[0].clone() for whole in wholes]

    def call() -> None:
        for whole, part in zip(wholes, parts, strict=True):
            gather(whole, part)
        for whole, part in zip(wholes, parts, strict=True):
            scatter(part, whole)

    return call


def gather(whole: Tensor, part: Tensor) -> None:
    if whole.nbytes < LEAST:
        dist.all_gather_single(whole, part)
    else:
        comm.all_gather(whole, part, codec="int8")


def scatter(part: Tensor, whole: Tensor) -> None:
    if whole.nbytes < LEAST:
        dist.reduce_scatter_single(part, whole)
    else:
        comm.reduce_scatter(part, whole, "avg", codec="int8")


def rank_main(rank: int, world: int, folder: str, transport: str, rounds: int, sent: Callable[[], int]) -> None:
    """What runs in each namespace; rank 0 writes a line ``case, system, ms, MB sent`` for each."""
    torch.set_num_threads(1)
    if transport == "fake":
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    else:
        dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    meeting = dist.FileStore(f"{folder}/meeting", world)
    numbers = itertools.count()

    def meet() -> None:
        """A barrier on any transport: ranks that start together are what the machine is shared by."""
        number = next(numbers)
        meeting.set(f"{number}/{rank}", "here")
        meeting.wait([f"{number}/{other}" for other in range(world)])
        dist.barrier()  # closer, where something is sent

    lines = []
    for case in SIZES:
        calls: dict[str, Callable[[], Any]] = {
            "inductor": step_of(case),
            "qpass int8": step_of(case, backend="qpass", options={"comm": "int8"}),
        }
        if case in SMALL:
            for system, join in (("qpass int8, all of it", True), ("qpass int8, all of it, apart", False)):
                policy = comm.Policy("int8", min_bytes=0, join=join)
                calls[system] = step_of(case, backend="qpass", options={"comm": policy})
        if transport == "gloo":
            calls["eager int8"] = eager(case)
        times: dict[str, list[float]] = {system: [] for system in calls}
        megabytes = dict.fromkeys(calls, 0.0)
        for turn in range(-WARM_UP, rounds):
            for system, call in calls.items():
                meet()
                before, start = sent(), time.perf_counter()
                call()
                taken = 1e3 * (time.perf_counter() - start)
                meet()  # what this rank has sent has arrived
                if turn >= 0:
                    times[system].append(taken)
                    megabytes[system] += (sent() - before) / 1e6 / rounds
        behind = SILENT if transport == "fake" else ""
        lines += [f"{case}\t{system}{behind}\t{min(times[system]):.2f}\t{megabytes[system]:.2f}" for system in calls]
    meet()
    if rank == 0:
        Path(folder, "figures").write_text("\n".join(lines))
    dist.destroy_process_group()
