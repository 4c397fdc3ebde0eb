"""Recurrent layers and randomized ReLU stay in float in training, and follow its mode as torch's own do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from pipeline_run import Do
from qpass.fake_quantize import disable_fake_quant

SEQUENCES, ROWS = torch.randn(3, 6, 10), torch.randn(4, 10)


def by_layer(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.out(m.rnn(m.inp(x).relu())[0])
    return result


def with_rnn(rnn: nn.Module) -> tuple[nn.Module, Tensor]:
    return Do(by_layer, inp=nn.Linear(10, 16), rnn=rnn, out=nn.Linear(20, 5)), SEQUENCES


def with_rrelu(inplace: bool) -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(10, 8), nn.RReLU(inplace=inplace), nn.Linear(8, 2)), ROWS


MODELS = {
    "gru": lambda: with_rnn(nn.GRU(16, 20, 2, dropout=0.5, batch_first=True)),
    "lstm": lambda: with_rnn(nn.LSTM(16, 10, 2, dropout=0.5, batch_first=True, bidirectional=True)),
    "rnn": lambda: with_rnn(nn.RNN(16, 20, 2, dropout=0.5, batch_first=True, nonlinearity="relu")),
    "one layer": lambda: with_rnn(nn.GRU(16, 20, batch_first=True)),
    "rrelu": lambda: with_rrelu(False),
    "rrelu_": lambda: with_rrelu(True),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_float_model_in_both_modes_and_converts(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    prepared = qpass.prepare(copy.deepcopy(model).train(), (x,), config=qpass.presets.int8_qat(compute_dtype=None))
    prepared(x).sum().backward()
    prepared.zero_grad()
    rounded = copy.deepcopy(prepared).eval()
    prepared.apply(disable_fake_quant)
    for training in (True, False):
        found = []
        for m in (model.train(training), prepared.train(training)):
            torch.manual_seed(1)
            y = m(x)
            y.square().sum().backward()
            found.append([y, *(p.grad for p in m.parameters())])
            torch.manual_seed(2)
            is_random = training and name != "one layer"
            assert torch.equal(m(x), y) is not is_random
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    quantized = qpass.convert(rounded)
    with torch.no_grad():
        assert torch.equal(quantized(x), rounded(x))


def test_the_report_says_why() -> None:
    model, x = MODELS["gru"]()
    rows = [row for row in qpass.report(qpass.prepare(model.train(), (x,), config="int8_qat")).rows if "gru" in row.op]
    assert [(row.module, row.outcome) for row in rows] == [("rnn", "float")]
    assert rows[0].reason
