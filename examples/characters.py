"""What the training examples have in common: a small transformer, the text that it learns, the loop and the table.

The text is the source of Python's own standard library, so nothing is downloaded.
"""

from __future__ import annotations

import statistics
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

LENGTH, WIDTH, LAYERS, BATCH = 64, 96, 2, 16  # of a text, of the model, texts a rank and step
SIGNS = 128  # ASCII; the little else there is in the source text is left out


class CharacterModel(nn.Module):
    """Predicts the next character of a text: a causal transformer with learnt positions."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.sign, self.position = nn.Embedding(SIGNS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, SIGNS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def forward(self, text: Tensor, following: Tensor) -> Tensor:
        """Characters and those that follow, int64 [batch, LENGTH] -> mean cross entropy, nats a character."""
        x = self.sign(text) + self.position.weight
        scores = self.head(self.layers(x, mask=self.mask, is_causal=True))
        return cross_entropy(scores.flatten(0, 1), following.flatten())


def library_text(size: int = 4_000_000) -> tuple[Tensor, Tensor]:
    """The first ``size`` ASCII characters of the standard library's own modules, in the order of their names, uint8:
    nine tenths to learn from, and the last tenth, which training never sees."""
    read = bytearray()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        read += bytes(sign for sign in file.read_bytes() if sign < SIGNS)
        if len(read) >= size:
            break
    source = torch.frombuffer(read[:size], dtype=torch.uint8)
    return source[: -len(source) // 10], source[-len(source) // 10 :]


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


def train(model: nn.Module, steps: int, sent: Callable[[], int], compiled: Callable[..., Any] | None = None) -> Run:
    """Train ``model``, or its ``compiled`` form; ``sent()`` are the bytes that this rank has sent so far."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    lessons, unseen = library_text()
    with torch.no_grad():
        first = model(*texts(unseen, 256, seed=-1)).item()
    before, times, call = sent(), [], model if compiled is None else compiled
    for step in range(steps):
        start = time.perf_counter()
        batch = texts(lessons, BATCH, seed=step * dist.get_world_size() + dist.get_rank())
        call(*batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        times.append(1e3 * (time.perf_counter() - start))
    ms, megabytes = statistics.median(times), (sent() - before) / 1e6 / steps  # the first step compiles
    with torch.no_grad():
        return Run(first, model(*texts(unseen, 256, seed=-1)).item(), megabytes, ms)


def print_runs(title: str, column: str, runs: dict[str, Run]) -> None:
    """A line for each run, its last loss compared with that of the first run."""
    plain = next(iter(runs.values()))
    print(title)
    print(f"{column:16s}  loss before  loss after            MB sent a step  ms a step")
    for name, run in runs.items():
        change = f"{100 * (run.last / plain.last - 1):+.2f} %"
        print(f"{name:16s}  {run.first:11.4f}  {run.last:10.4f}  {change:>8s}  {run.megabytes:14.3f}  {run.ms:9.1f}")
