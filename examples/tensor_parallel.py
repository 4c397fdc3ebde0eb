"""Tensor-parallel inference with compressed sums: transformer blocks on two ranks, each with half of every weight.

    torchrun --nproc-per-node 2 examples/tensor_parallel.py

Behind the attention and behind the feed-forward part of every block, the ranks add up what each has computed (an
all_reduce). ``torch.compile(backend="qpass", options={"comm": ...})`` sends these terms as int8 or int4.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from wire import bytes_sent

import qpass

HEAD = 64  # the width of one attention head


class Block(nn.Module):
    """A transformer block that works with all heads, or with a part of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.proj = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[batch, length, width]``, causal."""
        y = self.norm1(x)
        q, k, v = (linear(y).unflatten(-1, (-1, HEAD)).transpose(1, 2) for linear in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def parallel(block: Block, mesh: DeviceMesh) -> Block:
    """Cut the weights between the ranks, in place: heads and hidden channels by columns, what reads them by rows."""
    columns = dict.fromkeys(("q", "k", "v", "up"), ColwiseParallel())
    parallelize_module(block, mesh, columns | dict.fromkeys(("proj", "down"), RowwiseParallel()))
    return block


@dataclass
class Run:
    """One way of sending: error relative to the whole model's result, bytes that a rank sends a call, and time."""

    error: float
    megabytes: float
    ms: float


def measure(call: Callable[[Tensor], Tensor], x: Tensor, whole: Tensor, rounds: int) -> Run:
    """Call it once to compile, then ``rounds`` times."""
    error = ((call(x) - whole).norm() / whole.norm()).item()
    before, times = bytes_sent(), []
    for _ in range(rounds):
        start = time.perf_counter()
        call(x)
        times.append(1e3 * (time.perf_counter() - start))
    return Run(error, (bytes_sent() - before) / 1e6 / rounds, statistics.median(times))


@torch.no_grad()
def main() -> dict[str, Run]:
    """Run the same blocks each way; rank 0 prints error, bytes and time, and what became of every collective."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--codecs", nargs="+", default=["int8", "int4"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(options.width) for _ in range(options.blocks))).eval()
    x = torch.randn(4, 128, options.width)
    whole = model(x)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model:
        parallel(block, mesh)
    runs = {"inductor": measure(torch.compile(model), x, whole, options.rounds)}
    reports = []
    for codec in options.codecs:
        compiled = torch.compile(model, backend="qpass", options={"comm": codec})
        runs[f"qpass {codec}"] = measure(compiled, x, whole, options.rounds)
        reports.append(qpass.report(compiled))
    if dist.get_rank() == 0:
        print(f"{options.blocks} transformer blocks of width {options.width} on {dist.get_world_size()} ranks")
        print("compiled by       relative error  MB sent a call  ms a call")
        for name, run in runs.items():
            print(f"{name:16s}  {run.error:14.1e}  {run.megabytes:14.3f}  {run.ms:9.1f}")
        print(f"\n{reports[0]}")
    dist.destroy_process_group()
    return runs


if __name__ == "__main__":
    main()
