"""Compile time with compressed collectives beside Inductor alone, on the same programs; nothing is sent.

    python tests/benchmarks/compile_comm.py --json F [--rounds 3] [--layers 4] [--dynamic]

One process in torch's fake group of 2 ranks. Every compilation starts with empty caches and counts from the first call
to the end of its first step; the systems take turns.
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
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache
from torch.distributed import _functional_collectives as funcol

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

import qpass
from benchmarks.measure import Row, print_table, write_json

OPTIONS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "qpass": {"backend": "qpass", "options": {"comm": qpass.comm.Policy("int8", min_bytes=0)}},
}


class Block(nn.Module):
    """A transformer block, [B, T, 256]; in tensor parallelism two sums over the ranks, sharded six gathered weights."""

    def __init__(self, sharded: bool) -> None:
        super().__init__()
        self.sharded = sharded
        self.norms = nn.ModuleList(nn.LayerNorm(256) for _ in range(2))
        shapes = [(768, 256), (256, 256), (1024, 256), (256, 1024)]
        parts = [(rows // 2, columns) for rows, columns in shapes] if sharded else shapes
        self.weights = nn.ParameterList(torch.randn(shape) / 16 for shape in parts)

    def weight(self, index: int) -> Tensor:
        w = self.weights[index]
        return funcol.all_gather_tensor_autograd(w, 0, dist.group.WORLD) if self.sharded else w

    def summed(self, x: Tensor) -> Tensor:
        return x if self.sharded else funcol.all_reduce(x, "sum", dist.group.WORLD)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.norms[0](x) @ self.weight(0).t()).view(*x.shape[:2], 3, 4, 64).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.summed(attended.transpose(1, 2).reshape(x.shape) @ self.weight(1).t())
        return x + self.summed(nn.functional.gelu(self.norms[1](x) @ self.weight(2).t()) @ self.weight(3).t())


def tensor_parallel(layers: int) -> Callable[..., Any]:
    """Inference of some blocks: two all_reduces in each."""
    model = nn.Sequential(*(Block(False) for _ in range(layers))).requires_grad_(False)
    return lambda options: torch.compile(model, **options)(torch.randn(2, 64, 256))


def sharded_training(layers: int) -> Callable[..., Any]:
    """A training step of some blocks: four all_gathers forward and four reduce_scatters backward in each."""
    model = nn.Sequential(*(Block(True) for _ in range(layers)))
    return lambda options: torch.compile(model, **options)(torch.randn(2, 64, 256)).square().mean().backward()


def seconds(step: Callable[..., Any], options: dict[str, Any]) -> float:
    torch._dynamo.reset()
    with fresh_cache():
        start = time.perf_counter()
        step(options)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dynamic", action="store_true", help="with symbolic sizes of the batch")
    given = parser.parse_args()
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    rows = []
    for program in (tensor_parallel, sharded_training):
        step = program(given.layers)
        times: dict[str, list[float]] = {system: [] for system in OPTIONS}
        for turn in range(1 + given.rounds):  # the first imports
            for system, options in OPTIONS.items():
                took = seconds(step, {**options, "dynamic": given.dynamic or None})
                times[system] += [took] if turn else []
        case = f"{program.__name__}, {given.layers} blocks{', symbolic sizes' * given.dynamic}"
        for metric, figure in (("compile_median", statistics.median), ("compile_min", min)):
            rows += [Row(case, system, metric, round(figure(took), 3), "s") for system, took in times.items()]
    print_table(rows, ratio_of="compile_median", ratio_to="inductor")
    write_json(given.json, rows)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
