"""Throughput of fake-quantize modules, forward and backward, compiled and eager, beside torch's eager modules.

    python tests/benchmarks/fake_quantize.py --json F [--size 1024 4096] [--threads 2]

Every module rounds and is differentiated, as in a training step; it observes first, except in the rows "frozen". All
systems take turns in one process. "two copies" is the floor: an output and a gradient have to be written, and each is
as large as what it is made of. From 32 MiB on most of that floor is the kernel handing out fresh pages, which the
systems have in common; ``THP_MEM_ALLOC_ENABLE=1`` lets torch ask for large ones, and shows what lies below.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization as torchs
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

import qpass.fake_quantize
import qpass.observer
from benchmarks.measure import Row, latency_rows, pin_threads, print_table, turn, write_json


def per_tensor(quantize: Any, observer: Any) -> nn.Module:
    return quantize.FakeQuantize(observer.MovingAverageMinMaxObserver, 0, 255, dtype=torch.quint8)


def per_channel(quantize: Any, observer: Any) -> nn.Module:
    return quantize.FakeQuantize(
        observer.MovingAveragePerChannelMinMaxObserver,
        -128,
        127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )


def fused(quantize: Any, observer: Any) -> nn.Module:
    return quantize.default_fused_act_fake_quant()


CASES: dict[str, Callable[[Any, Any], nn.Module]] = {
    "per tensor": per_tensor,
    "per channel": per_channel,
    "fused": fused,
}


def step(module: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], None]:
    """One forward and one backward."""

    def run(x: Tensor, grad: Tensor) -> None:
        x.grad = None
        module(x).backward(grad)

    return run


def two_copies(x: Tensor, grad: Tensor) -> None:
    """What a forward and a backward must write at least."""
    x.grad = None
    _, x.grad = x.detach().clone(), grad.clone()


def measure(case: str, size: int, frozen: bool, turns: int) -> list[Row]:
    make = CASES[case]
    x, grad = torch.randn(size, size, requires_grad=True), torch.randn(size, size)
    modules: dict[str, Callable[[Tensor], Tensor]] = {
        "qpass compiled": torch.compile(make(qpass.fake_quantize, qpass.observer), fullgraph=True),
        "qpass eager": make(qpass.fake_quantize, qpass.observer),
        "torch eager": make(torchs, torchs),
    }
    systems = {name: step(module) for name, module in modules.items()} | {"two copies": two_copies}
    for name, module in modules.items():
        for _ in range(2):  # a compiled module learns the number of channels in the first call
            systems[name](x, grad)
        if frozen:
            module.observer_enabled[0] = 0  # type: ignore[attr-defined]
    times: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(turns):
        for name, system in systems.items():
            times[name] += turn(system, (x, grad), seconds=0.5)
    return latency_rows(f"{case}{' frozen' if frozen else ''} {size}x{size}", times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--size", type=int, nargs="+", default=[1024, 4096], help="of SIZE x SIZE float32 tensors")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    pin_threads(options.threads)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for case, size, frozen in itertools.product(CASES, options.size, (False, True)):
        rows += measure(case, size, frozen, options.turns)
        write_json(options.json, rows)
    print_table(rows, ratio_of="latency_median", ratio_to="torch eager")


if __name__ == "__main__":
    main()
