"""Time that quantization-aware training takes to prepare and to convert, against depth, beside torchao's.

    python tests/benchmarks/qat.py --json F [--depths 1,10,20,40] [--peers torchao] [--rounds 5]

A case is a chain of convolution, batch norm and relu. Prepare counts the capture, for both sides. Each figure is the
median of ``--rounds`` calls after one that is not counted; torchao, whose convert takes seconds, is called once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "support"))

from benchmarks.measure import Row, pin_threads, print_table, write_json

CHANNELS = 8


def chain(depth: int) -> nn.Module:
    """``depth`` times convolution, batch norm, relu, in training mode."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*layers).train()


def example_inputs() -> tuple[Tensor]:
    return (torch.randn(2, CHANNELS, 8, 8),)


def qpass_system(depth: int) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    import qpass

    model = chain(depth)
    return lambda: qpass.prepare(model, example_inputs(), config="int8_qat"), qpass.convert


def torchao_system(depth: int) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    model = chain(depth)
    config = x86.get_default_x86_inductor_quantization_config(is_qat=True)

    def prepare() -> Any:
        quantizer = x86.X86InductorQuantizer().set_global(config)
        return prepare_qat_pt2e(torch.export.export(model, example_inputs()).module(), quantizer)

    return prepare, lambda prepared: convert_pt2e(copy.deepcopy(prepared))  # its convert destroys what it is given


SYSTEMS = {"qpass": qpass_system, "torchao": torchao_system}


def measure(system: str, depth: int, rounds: int) -> list[Row]:
    """Milliseconds of prepare and of convert in the middle of training."""
    prepare, convert = SYSTEMS[system](depth)
    prepared, prepare_ms = timed(prepare, rounds)
    prepared(*example_inputs())[0].sum().backward()
    _, convert_ms = timed(lambda: convert(prepared), rounds)
    figures = {"prepare": prepare_ms, "convert": convert_ms}
    return [Row(f"{depth} conv + bn", system, metric, round(ms, 2), "ms") for metric, ms in figures.items()]


def timed(call: Callable[[], Any], rounds: int) -> tuple[Any, float]:
    """The last result of ``call``, and its median time; a single round is counted itself."""
    times, result = [], None
    for index in range(rounds + (rounds > 1)):
        start = time.perf_counter()
        result = call()
        if index or rounds == 1:
            times.append(1e3 * (time.perf_counter() - start))
    return result, statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    comma = lambda text: [word for word in text.split(",") if word]  # noqa: E731
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    parser.add_argument("--depths", type=comma, default=["1", "10", "20", "40"], help="convolutions in the chain")
    parser.add_argument("--peers", type=comma, default=["torchao"], help="torchao; empty for none")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of qpass")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    pin_threads(1)
    rows: list[Row] = []
    for depth in map(int, options.depths):
        rows += measure("qpass", depth, options.rounds)
        for peer in options.peers:
            if depth == int(options.depths[0]):  # a deeper chain takes it minutes
                rows += measure(peer, depth, 1)
        write_json(options.json, rows)
    print_table(rows, ratio_of="convert", ratio_to="qpass")


if __name__ == "__main__":
    main()
