"""Time and peak memory of the passes against graph size, on a transformer of tiny layers, beside torchao's.

    python tests/benchmarks/passes.py --json F [--sizes 1000,2000,5000,10000,20000] [--peers torchao]

Every size runs in a process of its own. Capture (torch.export) is timed but counts for neither side: both get the
exported graph. Memory is the largest resident set during the passes above what was resident before them.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from benchmarks.measure import Row, pin_threads, print_table, write_json

HIDDEN, HEADS = 16, 2


class Block(nn.Module):
    """Pre-norm attention and a two-layer perceptron, as small as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.query, self.key, self.value, self.out = (nn.Linear(HIDDEN, HIDDEN) for _ in range(4))
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def transformer(nodes: int) -> torch.export.ExportedProgram:
    """An exported transformer whose ``module()`` graph has about ``nodes`` nodes."""
    one, two = (len(_export(blocks).module().graph.nodes) for blocks in (1, 2))
    return _export(max(1, round((nodes - one) / (two - one)) + 1))


def _export(blocks: int) -> torch.export.ExportedProgram:
    return torch.export.export(nn.Sequential(*(Block() for _ in range(blocks))).eval(), example_inputs())


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(2, 4, HIDDEN),)


# ---- in the child process --------------------------------------------------------------------------------------------


def qpass_steps(program: torch.export.ExportedProgram) -> dict[str, Callable[[Any], Any]]:
    import qpass

    config = qpass.presets.get("int8_static")
    graph = program.module()
    return {
        "prepare": lambda _: qpass.prepare(graph, example_inputs(), config=config),
        "calibrate": _calibrated,
        "convert": qpass.convert,
        "lower": qpass.lower,
    }


def torchao_steps(program: torch.export.ExportedProgram) -> dict[str, Callable[[Any], Any]]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    graph = program.module()
    return {
        "prepare": lambda _: prepare_pt2e(graph, quantizer),
        "calibrate": _calibrated,
        "convert": convert_pt2e,
    }


SYSTEMS = {"qpass": qpass_steps, "torchao": torchao_steps}


def child(system: str, nodes: int, timeout: int) -> dict[str, tuple[float, str]]:
    """Metric -> (value, unit); "passes" sums the steps but calibration. TimeoutError ``timeout`` s after capture.

    A small graph goes through first, so that what a process does once (imports, tables of patterns) is in no figure.
    """
    pin_threads(1)
    with torch.no_grad():
        value = None
        for step in SYSTEMS[system](transformer(100)).values():
            value = step(value)
    start = time.perf_counter()
    program = transformer(nodes)
    figures: dict[str, tuple[float, str]] = {"capture": (time.perf_counter() - start, "s")}
    figures["graph"] = len(program.module().graph.nodes), "nodes"
    steps = SYSTEMS[system](program)
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(timeout)
    value, total, peak = None, 0.0, 0.0
    before_all = _resident_mib("VmRSS")
    with torch.no_grad():
        for name, step in steps.items():
            gc.collect()
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew (proc(5))
            start = time.perf_counter()
            value = step(value)
            seconds = time.perf_counter() - start
            figures[name] = seconds, "s"
            total += seconds if name != "calibrate" else 0.0
            peak = max(peak, _resident_mib("VmHWM") - before_all)
    return figures | {"passes": (total, "s"), "peak": (peak, "MiB")}


def _calibrated(prepared: nn.Module) -> nn.Module:
    prepared(*example_inputs())
    return prepared


def _resident_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


def _out_of_time(*_: Any) -> None:
    raise TimeoutError


# ---- in the parent ---------------------------------------------------------------------------------------------------


def measure(system: str, nodes: int, timeout: int, capture_timeout: int) -> list[Row]:
    """The rows of one system at one size, from a fresh process."""
    case = f"{nodes} nodes"
    command = [sys.executable, __file__, "--child", system, "--sizes", str(nodes), "--timeout", str(timeout)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout + capture_timeout)
    except subprocess.TimeoutExpired:
        return [Row(case, system, "failed", f"not done in {timeout + capture_timeout} s with capture", "reason")]
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        reason = f"not done in {timeout} s" if last.startswith("TimeoutError") else last[:300]
        return [Row(case, system, "failed", reason, "reason")]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    return [Row(case, system, metric, round(value, 4), unit) for metric, (value, unit) in figures.items()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    comma = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--sizes", type=comma, default=["1000", "2000", "5000", "10000", "20000"], help="graph nodes")
    parser.add_argument("--peers", type=comma, default=["torchao"], help="torchao; empty for none")
    parser.add_argument("--no-qpass", action="store_true", help="measure the peers only")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for the passes of one size")
    parser.add_argument("--capture-timeout", type=int, default=900, help="seconds for torch.export before them")
    parser.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(options.child, int(options.sizes[0]), options.timeout)))
        return
    rows: list[Row] = []
    for system in [*([] if options.no_qpass else ["qpass"]), *options.peers]:
        for nodes in map(int, options.sizes):
            print(f"{system}: {nodes} nodes", file=sys.stderr, flush=True)
            new = measure(system, nodes, options.timeout, options.capture_timeout)
            rows += new
            write_json(options.json, rows)
            if new[0].metric == "failed":
                break  # larger graphs only take longer
    print_table(rows, ratio_of="passes", ratio_to="qpass")


if __name__ == "__main__":
    main()
