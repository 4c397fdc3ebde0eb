"""A process group and a codec -> their `Link`: measured for half a second, and the same on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from qpass.comm.eager import collectives
from qpass.comm.eager.group import group_of
from qpass.comm.policy.cost import Link
from qpass.comm.wire.codec import Codec
from qpass.comm.wire.codec import codec as codec_of
from qpass.errors import InputError

SMALL, LARGE = 256, 1 << 20
"""Elements of float32 to measure with: one that latency rules, one that bandwidth rules."""


def calibrate_link(
    group: dist.ProcessGroup | None = None, codec: str | Codec = "int8", device: torch.device | str | None = None
) -> Link:
    """Measure what `qpass.comm.decide` needs to know. All ranks of the group call it together.

    Bandwidth and latency are those of the plain ``all_reduce`` that compression competes with, at 1 KiB and 4 MiB;
    the codec is timed alone on 4 MiB. A compressed all_reduce of 1 KiB then shows what a call costs beside, and one of
    4 MiB how much slower coding is among transfers, and other ranks on the same cores. Each is the fastest of 7, after
    2 that compile kernels and open connections: other work on the machine can only add. Rank 0's figures are taken by
    all.

    Args:
        group: None for the default one.
        codec: whose speed is measured.
        device: of the tensors that will be sent; by default the accelerator, and the CPU for gloo.

    Raises:
        InputError: a group of one rank, which sends nothing.
    """
    members, how = group_of(group), codec_of(codec)
    if members.world == 1:
        raise InputError("A group of one rank has no link to measure")
    process_group = members.process_group
    on_cpu = "gloo" in dist.get_backend(process_group)
    where = torch.device(device or (None if on_cpu else torch.accelerator.current_accelerator()) or "cpu")
    small, large = (torch.ones(numel, device=where) for numel in (SMALL, LARGE))
    payload = how.encode(large)

    def synchronized(run: Callable[[], object]) -> float:
        return _fastest(run, lambda: dist.barrier(group=process_group), where)

    few = synchronized(lambda: dist.all_reduce(small, group=process_group))
    many = synchronized(lambda: dist.all_reduce(large, group=process_group))
    few_coded = synchronized(lambda: collectives.all_reduce(small, "avg", process_group, how))
    many_coded = synchronized(lambda: collectives.all_reduce(large, "avg", process_group, how))
    encode = synchronized(lambda: how.encode(large))
    decode = synchronized(lambda: how.decode(payload, LARGE))

    world = members.world
    latency = few / (2 * (world - 1).bit_length())
    sent = 2 * (world - 1) / world
    bandwidth = sent * 4 * (LARGE - SMALL) / max(many - few, many / 10)
    alone = (1 + 1 / world) * encode + 2 * decode
    together = many_coded - few_coded - sent * payload.numel() / bandwidth
    slower = max(1.0, together / alone)
    rates = [4 * LARGE / (slower * seconds) for seconds in (encode, decode)]
    overhead = max(0.0, few_coded - 2 * latency)
    measured = torch.tensor([bandwidth, latency, *rates, overhead], dtype=torch.float64, device=where)
    dist.broadcast(measured, group=process_group, group_src=0)
    return Link(*measured.tolist())


def _fastest(run: Callable[[], object], meet: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of 7 runs that all ranks start together, after 2 that do not count."""
    times = []
    for _ in range(9):
        meet()
        start = time.perf_counter()
        result = run()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        del result
        times.append(time.perf_counter() - start)
    return min(times[2:])
