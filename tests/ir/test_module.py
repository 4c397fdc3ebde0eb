"""Copies of graph modules, deep and shallow, at every stage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from pipeline_run import STATIC, Do, same
from qpass.ir.module import GraphModule
from qpass.ir.record import graph_record

X = torch.randn(4, 8)


def forward(m: Any, x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda y: m.a(y), lambda y: m.a(-y), (m.b(x),)) + m.offset


@pytest.fixture(scope="module")
def stages() -> dict[str, Any]:
    model = Do(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval()
    model.register_buffer("offset", torch.ones(8), persistent=False)
    prepared = qpass.prepare(model, (X,), config=STATIC)
    with torch.no_grad():
        prepared(X), prepared(-X)
    quantized = qpass.convert(prepared)
    return {"prepared": prepared, "quantized": quantized, "lowered": qpass.lower(quantized)}


@pytest.mark.parametrize("stage", ["prepared", "quantized", "lowered"])
@torch.no_grad()
def test_a_deep_copy_computes_the_same_and_shares_nothing(stage: str, stages: dict[str, Any]) -> None:
    gm = stages[stage]
    copied = copy.deepcopy(gm)
    assert isinstance(copied, GraphModule)
    assert type(copied).__name__ == type(gm).__name__
    assert graph_record(copied).stage == stage
    assert copied.state_dict().keys() == gm.state_dict().keys()
    for x in (X, -X):
        assert same(copied(x), gm(x))
    tensors = {id(tensor) for tensor in [*gm.parameters(), *gm.buffers()]}
    assert tensors.isdisjoint(id(tensor) for tensor in [*copied.parameters(), *copied.buffers()])
    expected = copied(X)
    before = copy.deepcopy(gm)
    for tensor in [*gm.parameters(), *gm.buffers()]:
        if tensor.layout == torch.strided:
            tensor.zero_()
    assert same(copied(X), expected)
    stages[stage] = before


@pytest.mark.parametrize("stage", ["prepared", "quantized", "lowered"])
@torch.no_grad()
def test_a_shallow_copy_shares_tensors_and_keeps_what_a_graph_knows(stage: str, stages: dict[str, Any]) -> None:
    gm = stages[stage]
    copied = copy.copy(gm)
    assert isinstance(copied, GraphModule)
    assert same(copied(X), gm(X))
    assert copied.state_dict().keys() == gm.state_dict().keys()
    assert {t.data_ptr() for t in copied.parameters()} == {t.data_ptr() for t in gm.parameters()}
    if stage == "quantized":
        expected = gm(X)
        scales = {key: 2 * value for key, value in gm.state_dict().items() if value.dtype == torch.float64}
        copied.load_state_dict(scales, strict=False)
        assert not same(copied(X), expected)
        assert same(gm(X), expected)  # the numbers of a graph are not shared, as tensors are
