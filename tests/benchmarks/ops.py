"""Throughput of the operators, compiled and eager, against a plain copy of the same bytes and against torch's own.

    python tests/benchmarks/ops.py --json F [--cases quantize_per_channel] [--threads 2]

All systems of a case take turns in one process. A case names what it must reach; the figures are the minima.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from benchmarks.measure import Row, latency_rows, pin_threads, print_table, turn, write_json

Systems = dict[str, Callable[[], Any]]
COPY = "plain copy"


def main() -> None:
    options = parse()
    pin_threads(options.threads)
    rows: list[Row] = []
    for case in options.cases:
        rows += measure(case, CASES[case](), options)
        write_json(options.json, rows)
    print_table(rows, ratio_of="latency_min", ratio_to=COPY)


def measure(case: str, systems: Systems, options: argparse.Namespace) -> list[Row]:
    times: dict[str, list[float]] = {system: [] for system in systems}
    for _ in range(options.rounds):
        for system, run in systems.items():
            times[system] += turn(run, (), seconds=options.seconds)
    return latency_rows(case, times)


def quantize_per_channel() -> Systems:
    """float32 ``[4096, 4096]`` -> int8; compiled at most 1.3 copies of 80 MiB, eager at least twice torch's speed."""
    from qpass.ops import graph_ops, quantized_decomposed

    x = torch.randn(4096, 4096)
    tail = (torch.rand(4096) * 0.05 + 0.01, torch.randint(-5, 5, (4096,), dtype=torch.int32), 0, -128, 127, torch.int8)
    mine, torchs = quantized_decomposed.quantize_per_channel, graph_ops.quantize_per_channel
    compiled = torch.compile(lambda x: mine(x, *tail), dynamic=False)
    compiled_torch = torch.compile(lambda x: torchs(x, *tail), dynamic=False)
    # 64 MiB read and 16 MiB written are 80 MiB, which a copy of 40 MiB moves; its target is there already
    source = torch.zeros(x.numel() * 5 // 2, dtype=torch.uint8)
    target = torch.empty_like(source)
    return {
        COPY: lambda: target.copy_(source),
        "qpass compiled": lambda: compiled(x),
        "torch compiled": lambda: compiled_torch(x),
        "qpass eager": lambda: mine(x, *tail),
        "torch eager": lambda: torchs(x, *tail),
    }


CASES: dict[str, Callable[[], Systems]] = {"quantize_per_channel": quantize_per_channel}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    comma = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    parser.add_argument("--json", type=Path, help="write all rows to this file, after every case")
    parser.add_argument("--cases", type=comma, default=list(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns each system gets, in rotation")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn")
    options = parser.parse_args()
    if unknown := [case for case in options.cases if case not in CASES]:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(CASES)}")
    return options


if __name__ == "__main__":
    main()
