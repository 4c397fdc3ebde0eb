"""The text of a diff, to the letter, at each stage of a small model: the same in every run, whatever the hash seed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.capture.export import capture
from qpass.targets import X86

GOLDEN = Path(__file__).parent / "golden"


class Net(nn.Module):
    """A convolution with a batch norm, two equal layers, a norm that stays in float."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x))).flatten(2)
        for layer in self.layers:
            x = torch.nn.functional.gelu(layer(x))
        return self.norm(x)


def texts() -> dict[str, str]:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 8)
    captured = capture(Net().eval(), (x,))
    prepared = qpass.prepare(captured, config=qpass.presets.int8_static(compute_dtype=None))
    with torch.no_grad():
        prepared(x)
    quantized = qpass.convert(prepared)
    graphs = [captured, prepared, quantized, qpass.lower(quantized)]
    names = ("prepare", "convert", "lower")
    return {name: str(qpass.diff(a, b)) for name, a, b in zip(names, graphs, graphs[1:], strict=False)}


def expected(name: str) -> str:
    return (GOLDEN / f"{name}.txt").read_text()


def test_the_text_of_each_stage() -> None:
    found = texts()
    assert found["prepare"] + "\n" == expected("prepare")
    assert found["convert"] + "\n" == expected("convert")
    if X86.missing():
        pytest.skip(f"no int8 kernels here, so lowering is another: {X86.missing()}")
    assert found["lower"] + "\n" == expected("lower")


def test_it_is_the_same_in_a_process_with_another_hash_seed() -> None:
    """Unless it is set, this process has a seed of its own, another one in each run."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "-W", "ignore", __file__]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert ran.stdout == "\n\n".join(texts().values()) + "\n"


if __name__ == "__main__":
    print("\n\n".join(texts().values()))
