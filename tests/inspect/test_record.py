"""Every pass is seen, with what it did; the log and the trace see the same."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn

import qpass
from qpass.errors import InputError
from qpass.ir.module import copy_graph_module
from qpass.quantize.stages import convert_graph

aten = torch.ops.aten
record_module: Any = sys.modules["qpass.inspect.record"]  # `qpass.inspect.record` is the function
CONVERT = [
    "remove_modes", "fold_batch_norm", "lower_observers", "cast_compute_dtype", "expand_attention", "hoist_casts",
    "keep_strides", "fold_constants",
]  # fmt: skip


@pytest.fixture
def prepared() -> fx.GraphModule:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)).eval()
    x = torch.randn(2, 2, 4, 4)
    gm = qpass.prepare(torch.export.export(model, (x,)), config=qpass.presets.int8_static(compute_dtype=None))
    with torch.no_grad():
        gm(x)
    return gm


def test_each_pass_and_what_it_changed(prepared: fx.GraphModule) -> None:
    with qpass.record() as passes:
        quantized = qpass.convert(prepared)
    assert [found.name for found in passes] == CONVERT
    assert {found.stage for found in passes} == {"quantized"}
    assert [found.changed for found in passes] == [False, True, True, False, False, False, False, True]
    assert [found.changes for found in passes][:3] == [0, 1, 4]
    assert all(found.seconds > 0 for found in passes)
    fold = passes["fold_batch_norm"].diff
    assert {view.short for view in fold.removed if view.op == "call_function"} == {"batch_norm"}
    assert "PerChannelMinMaxObserver" in {view.short for view in fold.added}
    # the passes together made what convert made
    kept = {view.path for view in qpass.diff(prepared, quantized).added}
    made = {view.path for found in passes for view in found.diff.added}
    gone = {view.path for found in passes for view in found.diff.removed}
    assert kept == made - gone


def test_the_table(prepared: fx.GraphModule) -> None:
    with qpass.record() as passes:
        convert_graph(prepared)
    lines = str(passes).splitlines()
    assert lines[0].startswith("qpass record: 8 passes, 3 changed the graph, ")
    assert lines[1].split() == ["stage", "pass", "changed", "said", "+", "-", "~", "ms"]
    assert lines[4].split()[:4] == ["quantized", "fold_batch_norm", "yes", "1"]
    assert lines[6].split()[:3] == ["quantized", "cast_compute_dtype", "0"]
    assert len({len(line) for line in lines[1:]}) == 1
    html = passes._repr_mimebundle_()["text/html"]
    assert html.count("<details") > 3
    with pytest.raises(InputError, match=r"no pass 'fold_batchnorm' ran \(did you mean 'fold_batch_norm'\?\)"):
        passes["fold_batchnorm"]


def to_gelu(gm: fx.GraphModule) -> None:
    for node in gm.graph.find_nodes(op="call_function", target=aten.relu.default):
        node.target = aten.gelu.default


def test_passes_of_other_people(prepared: fx.GraphModule) -> None:
    from torch.fx.passes.infra.pass_base import PassBase, PassResult

    class Copied(PassBase):
        def call(self, graph_module: fx.GraphModule) -> PassResult:
            gm = copy_graph_module(graph_module)
            to_gelu(gm)
            return PassResult(gm, True)

    quantized = qpass.convert(prepared)
    with qpass.record() as passes:
        result = passes.run(Copied(), quantized)
        assert passes.run(to_gelu, quantized) is None
        passes.run(to_gelu, quantized)
    assert isinstance(result, PassResult)
    assert [(found.name, found.changed) for found in passes] == [
        ("Copied", True), ("to_gelu", True), ("to_gelu", False),
    ]  # fmt: skip
    assert all(len(found.diff.retargeted) == 1 for found in passes.passes[:2])


def test_recordings_nest_and_threads_are_apart(prepared: fx.GraphModule) -> None:
    with qpass.record() as outer:
        convert_graph(prepared)
        with qpass.record() as inner:
            convert_graph(prepared)
        other = threading.Thread(target=convert_graph, args=(prepared,))
        other.start()
        other.join()
    convert_graph(prepared)
    assert (len(outer), len(inner)) == (16, 8)


def test_nothing_is_looked_at_when_nobody_looks(prepared: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_module, "snapshot", lambda _: pytest.fail("a snapshot was taken"))
    monkeypatch.setattr(record_module, "_is_traced", lambda: False)
    monkeypatch.setattr(record_module.log, "level", logging.WARNING)
    convert_graph(prepared)


def test_the_log_prints_diffs(prepared: fx.GraphModule, caplog: pytest.LogCaptureFixture) -> None:
    """A logger named like its module: that is what TORCH_LOGS="+qpass" sets to DEBUG."""
    assert record_module.log.name == "qpass.inspect.record"
    with caplog.at_level(logging.DEBUG, logger="qpass"):
        convert_graph(prepared)
    printed = [entry.getMessage() for entry in caplog.records if entry.name == "qpass.inspect.record"]
    assert [text.splitlines()[0] for text in printed] == [
        f"qpass diff  {name} (to quantized)" for name in ("fold_batch_norm", "lower_observers", "fold_constants")
    ]


def test_each_diff_is_an_artifact_of_the_trace(prepared: fx.GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    artifacts: dict[str, str] = {}

    def keep(kind: str, metadata_fn: Any, payload_fn: Any) -> None:
        assert kind == "artifact"
        artifacts[metadata_fn()["name"]] = payload_fn()

    monkeypatch.setattr(record_module, "trace_structured", keep)
    monkeypatch.setattr(record_module, "_is_traced", lambda: True)
    convert_graph(prepared)
    assert list(artifacts) == [
        f"qpass_quantized_{name}" for name in ("fold_batch_norm", "lower_observers", "fold_constants")
    ]
    assert "batch_norm(conv2d(" in artifacts["qpass_quantized_fold_batch_norm"]


CONVERTED = """
import torch, qpass
model = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3), torch.nn.BatchNorm2d(4)).eval()
prepared = qpass.prepare(torch.export.export(model, (torch.zeros(2, 2, 4, 4),)), config=qpass.presets.int8_static())
prepared(torch.randn(2, 2, 4, 4))
with qpass.record() as passes:
    qpass.convert(prepared)
print(passes["fold_batch_norm"].diff)
"""


def test_the_trace_that_tlparse_reads_holds_the_diffs(tmp_path: Path) -> None:
    """A line of JSON that names the artifact and the MD5 of its text, and below it the text, indented by a tab."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CONVERTED],
        env={**os.environ, "TORCH_TRACE": str(tmp_path)}, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    (trace,) = tmp_path.iterdir()
    lines = trace.read_text().splitlines()
    (at,) = [index for index, line in enumerate(lines) if '"qpass_quantized_fold_batch_norm"' in line]
    told = json.loads(lines[at][lines[at].index("{") :])
    assert told["artifact"] == {"name": "qpass_quantized_fold_batch_norm", "encoding": "string"}
    text = "\n".join(line[1:] for line in itertools.takewhile(lambda line: line.startswith("\t"), lines[at + 1 :]))
    assert hashlib.md5(text.encode()).hexdigest() == told["has_payload"]
    assert "batch_norm(conv2d(" in text
    assert text in result.stdout


@pytest.mark.slow  # a compilation
def test_the_backend_is_recorded_too(prepared: fx.GraphModule) -> None:
    quantized = qpass.convert(prepared)
    with qpass.record() as passes, torch.no_grad():
        torch.compile(quantized, backend="qpass")(torch.randn(2, 2, 4, 4))
    lowering = ["lower_collectives", "carry_codes", "merge_siblings", "lower_islands", "keep_strides", "fold_constants"]
    pipelines = {stage: [found.name for found in passes if found.stage == stage] for stage in ("captured", "quantized")}
    assert pipelines["captured"] == list(qpass.passes.normalization_pipeline().names)
    assert pipelines["quantized"] == ["recognise_islands"]
    assert [found.name for found in passes][6:] == lowering
