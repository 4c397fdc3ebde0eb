"""What a function returns on every rank of a gloo group of real processes (`ranks.run` returns verdicts only)."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(world: int, function: Callable[..., Any], *args: Any, timeout: float = 240) -> list[Any]:
    """``function(*args)`` on each of ``world`` ranks; its results in rank order. A failure of one fails the caller."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed", "pytest", "qpass"])  # imported once for all ranks
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_rank, args=(rank, world, folder, function, args), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        ends = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, ends - time.monotonic()))
        for process in processes:
            if process.is_alive():
                process.kill()
        files = [Path(folder, f"{rank}.pt") for rank in range(world)]
        results = [torch.load(file, weights_only=False) if file.exists() else ("killed", None) for file in files]
    failures = [f"rank {rank}: {how}" for rank, (how, _) in enumerate(results) if how]
    assert not failures, "\n".join(failures)
    return [result for _, result in results]


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    result: Any = None
    try:
        init = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world, timeout=timedelta(seconds=60))
        result, how = function(*args), ""
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        how = traceback.format_exc()
    torch.save((how, result), f"{folder}/{rank}.pt.part")
    os.replace(f"{folder}/{rank}.pt.part", f"{folder}/{rank}.pt")
