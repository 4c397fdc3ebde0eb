"""One DDP bucket of 25 MB on 2 ranks: qpass's per-channel hook beside torch's and beside the plain all_reduce.

    python tests/benchmarks/ddp_hook.py --json F [--megabytes 25] [--rounds 5]

torch's hook raises on gloo in 2.13, so its repaired form is measured (`distributed.repaired_hooks`): one all_gather of
scales and zero points, one of codes, channels of 512 made one by one in Python. The systems take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

import qpass.comm
from benchmarks.measure import Row, print_table, write_json
from distributed.hook_defects import Bucket
from distributed.repaired_hooks import perchannel_hook
from on_ranks import on_ranks

Hook = Callable[[Any, Any], torch.futures.Future[torch.Tensor]]


def plain_hook(group: dist.ProcessGroup, bucket: Bucket) -> torch.futures.Future[torch.Tensor]:
    work = dist.all_reduce(bucket.buffer().div_(group.size()), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


HOOKS: dict[str, Hook] = {
    "torch, repaired for gloo": perchannel_hook,
    "plain all_reduce": plain_hook,
    "qpass": qpass.comm.quantization_perchannel_hook,
}


def measure(megabytes: float, rounds: int) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Milliseconds of every turn, and the relative error of every hook's result."""
    torch.manual_seed(dist.get_rank())
    gradient = torch.randn(round(megabytes * 1e6 / 4))
    average = gradient / dist.get_world_size()
    dist.all_reduce(average)
    group = dist.group.WORLD
    times: dict[str, list[float]] = {name: [] for name in HOOKS}
    errors = {}
    for turn in range(1 + rounds):  # the first compiles
        for name, hook in HOOKS.items():
            bucket = Bucket(gradient.clone())
            dist.barrier()
            start = time.perf_counter()
            result = hook(group, bucket).wait()
            dist.barrier()
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
            errors[name] = ((result - average).norm() / average.norm()).item()
    return times, errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--megabytes", type=float, default=25)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    times, errors = on_ranks(2, measure, options.megabytes, options.rounds)[0]
    case = f"bucket of {options.megabytes:g} MB"
    rows = [Row(case, name, "median", round(statistics.median(found), 3), "ms") for name, found in times.items()]
    rows += [Row(case, name, "error", round(error, 5), "") for name, error in errors.items()]
    write_json(options.json, rows)
    print_table(rows, ratio_of="median", ratio_to="qpass")


if __name__ == "__main__":
    main()
