"""Slips of the pen in a call of `prepare`: each is one error that says what to write instead."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from qpass.presets import int8_static

X = torch.randn(2, 8)
CONV, IMAGE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 4)).eval(), torch.randn(1, 3, 8, 8)


def linear() -> nn.Module:
    return nn.Linear(8, 8).eval()


@torch.inference_mode()
def in_inference_mode() -> nn.Module:
    return linear()


def under_autocast() -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return qpass.prepare(linear(), (X,))


SLIPS: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: qpass.prepare(CONV, tuple(IMAGE)), "example_inputs are the 1 rows of one tensor", "(x,) and not tuple(x)"),
    (lambda: qpass.prepare(linear(), (np.zeros((2, 8)),)), "an example input is a numpy.ndarray: [0]", "from_numpy"),
    (lambda: qpass.prepare(linear(), kwargs={"input": np.zeros(8)}), "a numpy.ndarray: ['input']", "from_numpy"),
    (lambda: qpass.prepare(linear(), iter([X])), "not list_iterator", "one batch, as next(iter(loader))"),
    (lambda: qpass.prepare(nn.ReLU, (X,)), "the model is the class ReLU", "pass an instance: ReLU(...)"),
    (lambda: qpass.prepare(torch.compile(linear()), (X,)), "compiled already", "the model that torch.compile was"),
    (lambda: qpass.prepare(torch.jit.trace(linear(), X), (X,)), "the model is TorchScript", "was scripted or traced"),
    (lambda: qpass.prepare(linear().to("meta"), (X,)), "on the meta device", "load the weights first"),
    (lambda: qpass.prepare(linear(), (X[:0],)), "an empty batch", "a batch of 2 or more"),
    (lambda: qpass.prepare(linear(), (X.to("meta"),)), "same device", "on one device"),
    (lambda: qpass.prepare(in_inference_mode(), (X,)), "inference tensor", "copy.deepcopy(model)"),
    (under_autocast, "torch.autocast is on", "outside of torch.autocast"),
]


@pytest.mark.parametrize(("call", "what", "hint"), SLIPS)
def test_a_slip_is_one_error_that_says_what_to_write(
    call: Callable[[], Any], what: str, hint: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(QpassError, match=re.escape(what)) as error:
        call()
    assert hint in str(error.value.hint)
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_rows_that_the_model_does_take_are_taken() -> None:
    bilinear = nn.Bilinear(8, 8, 4)
    model = nn.ModuleList([bilinear, nn.Linear(4, 4)])
    model.forward = lambda a, b: model[1](model[0](a, b))  # type: ignore[assignment]
    rows = torch.randn(2, 3, 8)
    assert torch.equal(qpass.prepare(model.eval(), tuple(rows))(*rows), model(*rows))


def test_data_parallel_is_what_it_holds() -> None:
    prepared = qpass.prepare(nn.DataParallel(CONV), (IMAGE,), config=int8_static().keep_float(module="2"))
    assert {row.module: row.outcome for row in qpass.report(prepared).rows if row.op in ("conv2d", "linear")} == {
        "0": "quantized", "2": "float",
    }  # fmt: skip


def test_the_copy_of_a_model_built_in_inference_mode_is_prepared() -> None:
    model = copy.deepcopy(in_inference_mode())
    assert torch.equal(qpass.prepare(model, (X,))(X), model(X))


@pytest.mark.parametrize("config", ["int8_static", "int8_dynamic", "int8_weight_only"])
def test_an_empty_batch_is_taken_at_every_stage(config: str) -> None:
    prepared = qpass.prepare(linear(), (X,), config=config)
    prepared(X)
    quantized = qpass.convert(prepared)
    for gm in (prepared, quantized, qpass.lower(quantized)):
        assert gm(X[:0]).shape == (0, 8)
