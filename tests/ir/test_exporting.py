"""What is said before a quantized graph is exported, by torch's exporters and by qpass.save."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from pipeline_run import PER_TOKEN, STATIC
from qpass.errors import InputError
from qpass.ir.exporting import WARNED_KEY, ExportWarning, warn_of_export

X = torch.randn(4, 8)


def quantized(config: Any = STATIC) -> Any:
    model = nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1), nn.Linear(8, 4)).eval()
    prepared = qpass.prepare(model, (X,), config=config)
    prepared(X)
    return qpass.convert(prepared)


@pytest.mark.parametrize("wrap", [nn.Sequential, lambda model: model])
def test_an_export_says_that_it_is_computed_in_floating_point(wrap: Callable[[Any], Any]) -> None:
    model = quantized()
    with pytest.warns(ExportWarning, match="AOTInductor, and torch.compile without qpass, compute it in float") as said:
        torch.export.export(wrap(model), (X,))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportWarning)
        if wrap(model) is model:  # of a part of a model, torch takes back what it notes down while it is traced
            torch.export.export(model, (X,))
    assert 'torch.compile(model, backend="qpass")' in str(said[0].message)


def test_save_and_calls_and_float_graphs_say_nothing(tmp_path: Path) -> None:
    model = quantized()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportWarning)
        model(X)
        torch.compile(model, backend="eager")(X)
        qpass.save(model, tmp_path / "model.pt2")
        assert qpass.load(tmp_path / "model.pt2").meta.get(WARNED_KEY) is None
        torch.export.export(qpass.prepare(nn.Linear(8, 8).eval(), (X,), config=STATIC).eval(), (X,))


def test_a_lowered_graph_is_not_exported() -> None:
    lowered = qpass.lower(quantized())
    with pytest.raises(InputError, match="a lowered graph cannot be exported: its weights are packed for this machine"):
        torch.export.export(lowered, (X,))
    assert dict(lowered.named_buffers())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (STATIC, []),
        (qpass.presets.int8_static(compute_dtype=torch.bfloat16), ["computes in bfloat16", "compute_dtype=None"]),
        (PER_TOKEN, ["computes scales while it runs", "int8_static or int8_weight_only"]),
    ],
)
def test_what_onnx_has_no_form_for(config: Any, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    model = quantized(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_export(model)
        warn_of_export(model)
    assert len(caught) == bool(said)
    assert all(words in str(caught[0].message) for words in said)
