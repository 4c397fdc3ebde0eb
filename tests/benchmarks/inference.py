"""Latency and SQNR of qpass and its peers on whole models, and the int8 kernel floor, in interleaved turns.

    python tests/benchmarks/inference.py --json F [--models mlp,bert] [--peers inductor,torchao] [--threads 2]

Every system is built in each of its settings and reported in the fastest. One that is missing or fails on a model is a
row with its reason; the others still run. SQNR is against the fp32 eager model, on an input calibration has not seen.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from benchmarks.measure import Row, cpu_seconds, latency_rows, print_table, write_json
from benchmarks.peers import SYSTEMS, Batches, Build, Inputs, Peer
from benchmarks.roofline import roofline
from benchmarks.worker import Worker
from models import MODELS

DEFAULT_MODELS = ("mlp", "bert", "resnet50", "mobilenet_v2", "vit", "gpt2", "llama")
ROOFLINE = "int8 kernels alone"
SHOWN = ("setting", "latency_median", "latency_min", "sqnr_db", "busy cores", "failed")


def main() -> None:
    options = parse()
    systems: dict[str, dict[str, Build]] = {}
    if not options.no_qpass:
        systems |= {"qpass": QPASS_STATIC, "qpass dynamic": {"int8_dynamic": qpass_dynamic}}
    for peer in options.peers:
        systems |= SYSTEMS[peer]
    systems[ROOFLINE] = {"": roofline}
    rows: list[Row] = []
    for case in options.models:
        rows += measure_model(case, systems, options)
        write_json(options.json, rows)
    print_table([row for row in rows if row.metric in SHOWN], ratio_of="latency_median", ratio_to="qpass")


def measure_model(case: str, systems: dict[str, dict[str, Build]], options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    workers: dict[str, Worker] = {}
    for system, settings in systems.items():
        worker, facts = fastest(case, system, settings, options)
        rows += facts
        if worker is not None:
            workers[system] = worker
    times: dict[str, list[float]] = {system: [] for system in workers}
    others, start = cpu_seconds(), time.perf_counter()
    for _ in range(options.rounds):
        for system, worker in workers.items():
            milliseconds, spent = worker.turn(options.seconds)
            times[system] += milliseconds
            others += spent
    others = max(0.0, cpu_seconds() - others) / (time.perf_counter() - start)
    for worker in workers.values():
        worker.stop()
    floor = [Row(case, ROOFLINE, "roofline", round(min(times[ROOFLINE]), 4), "ms")] if ROOFLINE in times else []
    rows += [*latency_rows(case, times), *floor]
    return [*rows, Row(case, "other processes", "busy cores", round(others, 2), "cores")]


def fastest(
    case: str, system: str, settings: dict[str, Build], options: argparse.Namespace
) -> tuple[Worker | None, list[Row]]:
    """The system in the setting with the smallest minimum latency, and a row for each setting tried."""
    rows: list[Row] = []
    best: tuple[float, str, Worker] | None = None
    for setting, build in settings.items():
        label = f"{system} [{setting}]" if len(settings) > 1 else system
        print(f"{case}: {label}", file=sys.stderr, flush=True)
        try:
            worker = Worker(build, case, options.size, options.threads, options.timeout)
            milliseconds = min(worker.turn(1.0)[0])
        except RuntimeError as error:
            rows.append(Row(case, label, "failed", str(error)[:300], "reason"))
            continue
        if len(settings) > 1:
            rows.append(Row(case, label, "latency_min", round(milliseconds, 4), "ms"))
            rows.append(Row(case, label, "sqnr_db", round(worker.facts["sqnr"], 2), "dB"))
        if best is None or milliseconds < best[0]:
            if best is not None:
                best[2].stop()
            best = milliseconds, setting, worker
        else:
            worker.stop()
    if best is None:
        return None, rows
    _, setting, worker = best
    for kernel, count in worker.facts["kernels"].items():
        rows.append(Row(case, system, f"calls of {kernel}", count, "calls"))
    rows.append(Row(case, system, "setting", setting, "name"))
    if worker.facts["sqnr"] is not None:
        rows.append(Row(case, system, "sqnr_db", round(worker.facts["sqnr"], 2), "dB"))
    return worker, rows


def qpass_static(
    model: nn.Module, example_inputs: Inputs, calibration_batches: Batches, inductor: dict[str, Any] | None = None
) -> Peer:
    import qpass

    prepared = qpass.prepare(model, example_inputs, config="int8_static")
    qpass.calibrate(prepared, calibration_batches)
    return qpass_compiled(qpass.convert(prepared), inductor)


def qpass_dynamic(model: nn.Module, example_inputs: Inputs, calibration_batches: Batches) -> Peer:
    import qpass

    return qpass_compiled(qpass.convert(qpass.prepare(model, example_inputs, config="int8_dynamic")))


def qpass_compiled(quantized: nn.Module, inductor: dict[str, Any] | None = None) -> Peer:
    import qpass

    compiled = torch.compile(quantized, backend=qpass.backend(inductor=inductor))

    def run(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return compiled(*inputs)

    return Peer(run)


QPASS_STATIC: dict[str, Build] = {
    "int8_static": qpass_static,
    "int8_static, C++ wrapper": functools.partial(qpass_static, inductor={"cpp_wrapper": True}),
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    comma = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    parser.add_argument("--json", type=Path, help="write all rows to this file, after every model")
    parser.add_argument("--models", type=comma, default=DEFAULT_MODELS, help=f"of {','.join(MODELS)}")
    parser.add_argument("--peers", type=comma, default=list(SYSTEMS), help=f"of {','.join(SYSTEMS)}; empty for none")
    parser.add_argument("--no-qpass", action="store_true", help="measure the peers only")
    parser.add_argument("--size", choices=("tiny", "full"), default="full")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="turns each system gets, in rotation")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of a turn")
    parser.add_argument("--timeout", type=float, default=600, help="seconds a system may take to build")
    options = parser.parse_args()
    for given, known in ((options.models, MODELS), (options.peers, SYSTEMS)):
        if unknown := [name for name in given if name not in known]:
            parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return options


if __name__ == "__main__":
    main()
