"""How the benchmarks measure: pinned threads, timed turns, SQNR, rows for ``--json``, a table."""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

System = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """One measured figure, or with ``metric="failed"`` the reason (in ``value``) why there is none."""

    case: str
    system: str
    metric: str
    value: float | str
    unit: str


def pin_threads(threads: int) -> None:
    """Give torch, OpenMP and MKL ``threads`` threads; peers with a pool of their own are told by `peers`."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


def turn(system: System, inputs: tuple[Tensor, ...], *, seconds: float = 0.3, at_least: int = 3) -> list[float]:
    """Milliseconds of every call of a turn of about ``seconds``, after two untimed calls that wake its threads."""
    for _ in range(2):
        system(*inputs)
    times: list[float] = []
    ends = time.perf_counter() + seconds
    while len(times) < at_least or time.perf_counter() < ends:
        start = time.perf_counter()
        system(*inputs)
        times.append(1e3 * (time.perf_counter() - start))
    return times


def cpu_seconds() -> float:
    """CPU seconds that the whole machine has worked since boot, of all processes together (Linux)."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def flat_outputs(outputs: Any) -> Tensor:
    """A model's output tensors (or arrays) as one float64 vector."""
    if isinstance(outputs, Mapping):
        outputs = list(outputs.values())
    tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return torch.cat([torch.as_tensor(t).detach().double().flatten() for t in tensors])


def sqnr(reference: Any, outputs: Any) -> float:
    """Signal to quantization noise ratio in dB, over all outputs: ``10 log10(sum(ref^2) / sum((ref - out)^2))``."""
    signal, other = flat_outputs(reference), flat_outputs(outputs)
    noise = (signal - other).square().sum().item()
    return math.inf if noise == 0 else 10 * math.log10(signal.square().sum().item() / noise)


def latency_rows(case: str, times: Mapping[str, list[float]]) -> list[Row]:
    return [
        Row(case, system, metric, round(figure(values), 4), "ms")
        for system, values in times.items()
        for metric, figure in (("latency_median", statistics.median), ("latency_min", min))
    ]


def write_json(path: Path | None, rows: Iterable[Row]) -> None:
    """Write the rows as a JSON list; infinities become strings, which JSON has no number for."""
    if path is None:
        return
    plain = [asdict(row) for row in rows]
    for row in plain:
        if isinstance(row["value"], float) and not math.isfinite(row["value"]):
            row["value"] = str(row["value"])
    path.write_text(json.dumps(plain, indent=1) + "\n")


def print_table(rows: Iterable[Row], *, ratio_of: str, ratio_to: str) -> None:
    """Print one line a case and system; the last column is the metric ``ratio_of`` over that of system ``ratio_to``."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    figures: dict[tuple[str, str], float] = {}
    for row in rows:
        value = row.value if isinstance(row.value, str) else f"{row.value:.4g} {row.unit}"
        cells.setdefault((row.case, row.system), {})[row.metric] = value
        if row.metric == ratio_of and not isinstance(row.value, str):
            figures[row.case, row.system] = row.value
    metrics = [m for m in dict.fromkeys(m for line in cells.values() for m in line) if m != "failed"]
    table = [["case", "system", *metrics, f"x {ratio_to}"]]
    for (case, system), line in cells.items():
        base, mine = figures.get((case, ratio_to)), figures.get((case, system))
        ratio = f"{mine / base:.2f}" if base and mine else ""
        table.append([case, system, *(line.get(m, "") for m in metrics), line.get("failed", ratio)])
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]) - 1)]
    for line in table:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]))
