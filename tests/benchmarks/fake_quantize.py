"""Throughput of fake-quantize modules, forward and backward, compiled and eager, beside torch's eager modules.

    python tests/benchmarks/fake_quantize.py --json F [--size 4096] [--threads 2]

Every module observes, rounds and is differentiated, as in a training step. All systems take turns in one process.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.ao.quantization as torchs
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def measure(case: str, size: int, turns: int) -> list[Row]:
    make = CASES[case]
    x, grad = torch.randn(size, size, requires_grad=True), torch.randn(size, size)
    systems = {
        "qpass compiled": torch.compile(make(qpass.fake_quantize, qpass.observer), fullgraph=True),
        "qpass eager": make(qpass.fake_quantize, qpass.observer),
        "torch eager": make(torchs, torchs),
    }
    times: dict[str, list[float]] = {name: [] for name in systems}
    for module in systems.values():
        for _ in range(2):  # a compiled module learns the number of channels in the first call
            step(module)(x, grad)
    for _ in range(turns):
        for name, module in systems.items():
            times[name] += turn(step(module), (x, grad), seconds=0.5)
    return latency_rows(f"{case} {size}x{size}", times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--size", type=int, default=4096, help="the tensors are SIZE x SIZE float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args(arguments)
    pin_threads(options.threads)
    warnings.simplefilter("ignore")
    rows: list[Row] = []
    for case in CASES:
        rows += measure(case, options.size, options.turns)
        write_json(options.json, rows)
    print_table(rows, ratio_of="latency_median", ratio_to="torch eager")


if __name__ == "__main__":
    main()
