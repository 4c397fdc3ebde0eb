"""Data-parallel training over compressed gradients: a character model learns Python from the standard library.

    torchrun --nproc-per-node 2 examples/train_ddp.py

The same small transformer is trained from the same weights on the same text once with torch's own all_reduce and once
for each compressed form. With ``--fsdp`` it is sharded by FSDP2, whose parameters then travel compressed as well.
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import qpass.comm

LENGTH, WIDTH, LAYERS, BATCH = 64, 96, 2, 16  # of a text, of the model, texts a rank and step
SIGNS = 128  # ASCII; the little else there is in the source text is left out


class CharacterModel(nn.Module):
    """Predicts the next character of a text: a causal transformer with learnt positions."""

    def __init__(self) -> None:
        super().__init__()
        self.sign, self.position = nn.Embedding(SIGNS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, LAYERS, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, SIGNS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        """Characters and those that follow, int64 [batch, LENGTH] -> mean cross entropy, nats a character."""
        x = self.sign(text) + self.position.weight
        scores = self.head(self.layers(x, mask=self.mask, is_causal=True))
        return cross_entropy(scores.flatten(0, 1), following.flatten())


def library_text(size: int = 4_000_000) -> Tensor:
    """The first ``size`` ASCII characters of the standard library's own modules, in the order of their names."""
    read = bytearray()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        read += bytes(sign for sign in file.read_bytes() if sign < SIGNS)
        if len(read) >= size:
            break
    return torch.frombuffer(read[:size], dtype=torch.uint8)


def texts(source: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """``count`` random places of ``source``: the characters there and those that follow, int64 [count, LENGTH]."""
    starts = torch.randint(len(source) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(seed))
    both = source[starts + torch.arange(LENGTH + 1)].long()
    return both[:, :-1], both[:, 1:]


@dataclass
class Run:
    """What one training came to: the unseen text's loss before and after, and what a step cost."""

    first: float
    last: float
    megabytes: float
    ms: float


def shard(model: CharacterModel) -> nn.Module:
    """FSDP2: every layer of the transformer is a unit of its own, the rest is one more."""
    for layer in model.layers.layers:
        fully_shard(layer)
    return fully_shard(model)


def train(wire: str, steps: int, fsdp: bool) -> Run:
    """Train from seed 0; ``wire`` says what gradients travel as: "fp32", "int8" or "int4 + feedback"."""
    torch.manual_seed(0)
    codec, _, feedback = wire.partition(" + ")
    model = shard(CharacterModel()) if fsdp else DistributedDataParallel(CharacterModel())
    if fsdp:
        sender = qpass.comm.compress_fsdp(model, all_gather="fp32" if codec == "fp32" else "int8", reduce_scatter=codec)
    else:
        sender = qpass.comm.ddp_hook(format=codec, error_feedback=bool(feedback))
        model.register_comm_hook(None, sender)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    source = library_text()
    lessons, unseen = source[: -len(source) // 10], source[-len(source) // 10 :]
    with torch.no_grad():
        first = model(*texts(unseen, 256, seed=-1)).item()
    sender.statistics.bytes = 0
    times = []
    for step in range(steps):
        start = time.perf_counter()
        model(*texts(lessons, BATCH, seed=step * dist.get_world_size() + dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append(1e3 * (time.perf_counter() - start))
    ms, megabytes = statistics.median(times), sender.statistics.megabytes / steps  # the first step compiles codecs
    with torch.no_grad():
        return Run(first, model(*texts(unseen, 256, seed=-1)).item(), megabytes, ms)


def main() -> dict[str, Run]:
    """Train each way, and let rank 0 print the end points of the loss, the bytes sent and the time a step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fsdp", action="store_true", help="shard the model by FSDP2 instead of copying it by DDP")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    wires = ["fp32", "int8", "int4"] if options.fsdp else ["fp32", "int8", "int4 + feedback"]
    runs = {wire: train(wire, options.steps, options.fsdp) for wire in wires}
    if dist.get_rank() == 0:
        kind = "FSDP2" if options.fsdp else "DDP"
        print(f"{options.steps} steps of {kind} on {dist.get_world_size()} ranks, loss on unseen text")
        print("gradients as      loss before  loss after            MB sent a step  ms a step")
        for wire, run in runs.items():
            change = f"{100 * (run.last / runs['fp32'].last - 1):+.2f} %"
            print(
                f"{wire:16s}  {run.first:11.4f}  {run.last:10.4f}  {change:>8s}  {run.megabytes:14.3f}  {run.ms:9.1f}"
            )
    dist.destroy_process_group()
    return runs


if __name__ == "__main__":
    main()
