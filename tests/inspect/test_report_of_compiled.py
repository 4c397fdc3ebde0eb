"""The report of what torch.compile returned or changed in place: the graphs of that model, and the truth about them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.quantize.passes.recognise_islands import CONVERTED_IN_FLOAT
from qpass.targets import X86

pytestmark = pytest.mark.skipif(bool(X86.missing()), reason=f"no int8 kernels here: {X86.missing()}")
X = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))


class Positions(nn.Module):
    """A linear of 1088 bytes behind a buffer of 64."""

    def __init__(self, positions: Tensor | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("positions", torch.randn(16) if positions is None else positions)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + self.positions)


def by_forward(model: nn.Module) -> Callable[..., Any]:
    model.forward = torch.compile(model.forward, backend="qpass")  # type: ignore[method-assign]
    return model


def in_place(model: nn.Module) -> Callable[..., Any]:
    model.compile(backend="qpass")
    return model


def wrapped(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, backend="qpass")


@torch.no_grad()
def test_of_every_way_to_compile_a_model() -> None:
    """Dynamo may run for one model what it compiled for another: the report is of the model that ran all the same."""
    for way in (by_forward, in_place, wrapped, in_place, wrapped):
        called: Any = way(Positions().eval())
        called(X)
        for program in (called, called.forward) if way is by_forward else (called,):
            found = qpass.report(program)
            assert (found.graphs, found.count("lowered"), found.bytes_before) == (1, 1, 1152), way


@torch.no_grad()
def test_of_models_that_share_a_buffer() -> None:
    shared = torch.randn(16)
    kernels = []
    for config in ("int8_dynamic", "int8_weight_only"):
        called = torch.compile(Positions(shared).eval(), backend="qpass", options={"config": config})
        called(X)
        found = qpass.report(called)
        assert (found.graphs, found.bytes_before) == (1, 1152)
        kernels += [row.kernel for row in found.rows if row.kernel]
    assert kernels == ["onednn.qlinear (per token)", "aten._weight_int8pack_mm"]


@torch.no_grad()
def test_of_a_converted_model() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 4)).eval()
    config = qpass.presets.int8_static().keep_float(module="3")
    prepared = qpass.prepare(model, (X,), config=config)
    prepared(X)
    called = torch.compile(qpass.convert(prepared), backend="qpass")
    called(X)
    found = qpass.report(called)
    rows = {row.module: (row.outcome, row.kernel, row.reason) for row in found.rows if row.op == "linear"}
    assert rows == {
        "0": ("lowered", "onednn.qlinear", "with relu, quantize"),
        "2": ("lowered", "onednn.qlinear", rows["2"][2]),
        "3": ("float", "", CONVERTED_IN_FLOAT),
    }
    assert "no pattern" not in rows["2"][2]
    assert found.bytes_before == 4 * (16 * 16 + 16 + 16 * 4 + 4 + 4 * 4 + 4)
