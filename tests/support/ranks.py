"""Real processes that talk through gloo: one start of them runs many cases, each of which pytest then reports."""

from __future__ import annotations

import importlib.util
import multiprocessing
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

OK = "ok"


def run(
    file: str, world: int, cases: list[str], timeout: float = 30.0, dies: int | None = None
) -> dict[str, list[str]]:
    """Call the functions `cases` of the Python file, one after the other, in `world` processes: ``case(rank, world)``.

    Returns for every case what each rank has to say: "ok", a traceback, or why it did not run. After a failure the
    ranks may not be in step any more, so the cases behind it are not run. `timeout` is the process group's, in seconds.
    `dies` is a rank that is meant to be killed in the last case, and has nothing to say.
    """
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.set_forkserver_preload(["torch.distributed", "pytest", "qpass"])  # imported once for all ranks
        arguments = (world, file, cases, folder, timeout, dies)
        processes = torch.multiprocessing.start_processes(
            _rank, arguments, world, join=dies is None, start_method="forkserver"
        )
        for process in processes.processes if processes else ():
            process.join()
        silent = dict.fromkeys(cases, "died")
        files = [Path(folder, f"said-{rank}") for rank in range(world)]
        said = [torch.load(file, weights_only=True) if file.exists() else silent for file in files]
    return {case: [answers[case] for answers in said] for case in cases}


def _rank(rank: int, world: int, file: str, cases: list[str], folder: str, timeout: float, dies: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=timeout), world, rank)
    module = load(file)
    store = dist.distributed_c10d._get_default_store()
    store.set(f"started/{rank}", "yes")  # a rank that dies while others still connect would take them along
    store.wait([f"started/{other}" for other in range(world)], timedelta(seconds=60))
    said = dict.fromkeys(cases, "not run: a case before it failed")
    for case in cases:
        torch.manual_seed(0)
        start = time.perf_counter()
        try:
            getattr(module, case)(rank, world)
            said[case] = OK
        except (Exception, pytest.fail.Exception):  # the latter, of `pytest.raises`, is no Exception
            said[case] = traceback.format_exc()
        if rank == 0:
            print(f"{world} ranks, {case}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        store.set(f"{case}/{rank}", said[case])
        keys = [f"{case}/{other}" for other in range(world) if other != dies]
        store.wait(keys, timedelta(seconds=3 * timeout))
        if any(store.get(key) != OK.encode() for key in keys):
            break
    torch.save(said, Path(folder, f"said-{rank}"))
    dist.destroy_process_group()


def load(file: str) -> object:
    """The module of a test file, by its path: pytest's own name for it means nothing in another process."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def everywhere(x: torch.Tensor) -> list[torch.Tensor]:
    """The bytes of `x` of every rank of the default group."""
    mine = x.contiguous().view(-1).view(torch.uint8) if x.numel() else torch.empty(0, dtype=torch.uint8)
    found = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(found, mine)
    return found
