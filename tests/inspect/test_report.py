from __future__ import annotations

import itertools
import json
import math
import random
import re

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import CaptureError, InputError, StrictError
from qpass.inspect import Report, Row, report_graphs
from qpass.inspect.values.path_patterns import path_patterns
from qpass.ir.record import NodeRecord, graph_record, record_of, set_record
from qpass.ir.text import graph_text, target_name
from qpass.targets import X86


class Net(nn.Module):
    """Two linears with a relu between, a layer norm, a softmax: 2 to quantize, 2 to leave, 1 to fuse, 1 that moves."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.layers[1](torch.relu(self.layers[0](x))))
        return torch.softmax(x.reshape(-1, 4, 4), -1)


def stages(model: nn.Module, x: torch.Tensor, config: object = "int8_static") -> dict[str, torch.fx.GraphModule]:
    prepared = qpass.prepare(model.eval(), (x,), config=config)
    prepared(x)
    quantized = qpass.convert(prepared)
    return {"prepared": prepared, "quantized": quantized, "lowered": qpass.lower(quantized)}


@pytest.fixture
def graphs() -> dict[str, torch.fx.GraphModule]:
    return stages(Net(), torch.randn(8, 16))


def node_of(gm: torch.fx.GraphModule, op: str) -> torch.fx.Node:
    return next(node for node in gm.graph.nodes if target_name(node) == op)


needs_kernels = pytest.mark.skipif(bool(X86.missing()), reason=f"no int8 kernels here: {X86.missing()}")


# The text


def test_the_text() -> None:
    rows = [
        Row("conv2d", f"blocks.{i}.conv", "lowered", "onednn.qconv", "with relu, quantize", "conv") for i in range(3)
    ]
    rows += [
        Row("linear", "self.query", "lowered", "onednn.qlinear", pattern="linear", count=3),
        Row("linear", "self.out", "quantized", reason="the added tensor is broadcast", pattern="linear"),
        Row("relu", "self.act", "quantized", reason="fused into linear_3", pattern="linear", fused=True),
        Row("view", "", "exact"),
        *(Row("softmax.int", "", "float", reason="probabilities are small", compute_dtype="bfloat16") for _ in "12"),
        Row("layer_norm", "norm", "float", reason="it computes statistics", compute_dtype="float32"),
        Row("gelu", "mlp", "unaccounted", reason="a pass lost it"),
    ]
    leftover = {"dequantize_per_channel": 1, "quantize_per_tensor": 4}
    text = str(Report("lowered", "x86", tuple(rows), 1_234_567, 321_000, leftover, ("the batch is fixed to 1",), 31.26))
    assert (
        text
        == """\
qpass report: lowered for x86
  operations  6 of 11 lowered to kernels, 1 quantized without a kernel, 3 left in float, 1 unaccounted
              besides, 1 fused into the one before and 1 only move values
  constants   1.23 MB -> 321.00 kB (26.0 %)
  SQNR        31.3 dB

operation    quantized  lowered  left in float  exact  unaccounted  kernel
-----------  ---------  -------  -------------  -----  -----------  --------------
conv2d       -          3        -              -      -            onednn.qconv
linear       1          3        -              -      -            onednn.qlinear
view         -          -        -              1      -
softmax.int  -          -        2              -      -
layer_norm   -          -        1              -      -
gelu         -          -        -              -      1

module                 operation    outcome        kernel or reason
---------------------  -----------  -------------  --------------------------------
blocks.{0..2}.conv x3  conv2d       lowered        onednn.qconv with relu, quantize
self.query x3          linear       lowered        onednn.qlinear 3 in one
self.out               linear       quantized      [1]
(top level) x2         softmax.int  left in float  [2]
norm                   layer_norm   left in float  [3]
mlp                    gelu         unaccounted    [4]

reasons
  [1] quantized, no kernel x1: the added tensor is broadcast
  [2] left in float x2: probabilities are small
  [3] left in float x1: it computes statistics
  [4] unaccounted x1: a pass lost it

what stays in float computes in: bfloat16 x2, float32 x1
q/dq left in the graph, for Inductor to fuse: dequantize_per_channel x1, quantize_per_tensor x4
note: the batch is fixed to 1"""
    )


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0..2}.b"]),
        (["a.0", "a.1"], ["a.{0,1}"]),
        (["a.1", "a.3", "a.5"], ["a.{1,3,5}"]),
        (["0", "2.x", "1"], ["{0,1}", "2.x"]),
        (["layer1.0.c", "layer2.0.c"], ["layer1.0.c", "layer2.0.c"]),  # a number within a word is part of a name
        (["a.0.0", "a.0.1", "a.1.0", "a.1.1"], ["a.{0,1}.{0,1}"]),
        (["a.0.0", "a.0.1", "a.1.1"], ["a.0.{0,1}", "a.1.1"]),  # a.1.0 is not there, so no pattern may say it is
        (["a.0.{q,k}", "a.1.{q,k}", ""], ["a.{0,1}.{q,k}", ""]),
    ],
)
def test_path_patterns(paths: list[str], expected: list[str]) -> None:
    assert [pattern for pattern, _ in path_patterns(paths)] == expected


@pytest.mark.parametrize("seed", range(20))
def test_path_patterns_stand_for_exactly_their_paths(seed: int) -> None:
    draw = random.Random(seed)
    every = [f"m.{i}.n.{j}.{k}" for i, j, k in itertools.product(range(4), range(3), range(3))]
    paths = draw.sample(every, draw.randint(1, len(every)))

    def expand(pattern: str) -> set[str]:
        spans = [re.sub(r"(\d+)\.\.(\d+)", lambda m: ",".join(map(str, range(int(m[1]), int(m[2]) + 1))), span)
                 for span in re.findall(r"\{(.*?)\}", pattern)]  # fmt: skip
        template = re.sub(r"\{.*?\}", "{}", pattern)
        return {template.format(*choice) for choice in itertools.product(*(span.split(",") for span in spans))}

    grouped = list(path_patterns(paths))
    assert all(expand(pattern) == set(members) for pattern, members in grouped)
    assert sorted(path for _, members in grouped for path in members) == sorted(paths)


# What is counted


@pytest.mark.parametrize("stage", ["prepared", "quantized"])
def test_before_lowering(graphs: dict[str, torch.fx.GraphModule], stage: str) -> None:
    found = qpass.report(graphs[stage])
    assert found.stage == stage
    assert (found.count(), found.count("quantized"), found.count("float"), found.count("exact")) == (4, 2, 2, 1)
    assert [(row.op, row.module) for row in found.rows if row.outcome == "quantized" and not row.fused] == [
        ("linear", "layers.0"), ("linear", "layers.1"),
    ]  # fmt: skip
    assert [row.op for row in found.rows if row.fused] == ["relu"]
    assert "2 of 4 quantized, 2 left in float\n              besides, 1 fused into the one before" in str(found)
    assert found.leftover.get("quantize_per_tensor", 0) == (2 if stage == "quantized" else 0)


@needs_kernels
def test_lowered(graphs: dict[str, torch.fx.GraphModule]) -> None:
    found = qpass.report(graphs["lowered"], strict=True)  # nothing was asked for and not done
    assert (found.stage, found.target) == ("lowered", "x86")
    assert (found.count(), found.count("lowered"), found.count("float")) == (4, 2, 2)
    lowered = {row.module: (row.kernel, row.reason) for row in found.rows if row.outcome == "lowered"}
    assert lowered["layers.0"] == ("onednn.qlinear", "with relu, quantize")
    assert found.leftover == {"quantize_per_tensor": 1}  # the model's input; all else is inside of kernels
    reasons = {row.op: row.reason for row in found.rows if row.outcome == "float"}
    assert "statistics" in reasons["layer_norm"]
    assert "probabilities" in reasons["softmax.int"]


def test_without_kernels_the_reason_is_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(X86), "missing", lambda: "this CPU is too old")
    lowered = stages(Net(), torch.randn(8, 16))["lowered"]
    found = qpass.report(lowered)
    assert found.count("lowered") == 0
    assert [row.reason for row in found.missed] == ["this CPU is too old"] * 2
    assert "0 of 4 lowered to kernels, 2 quantized without a kernel, 2 left in float" in str(found)
    assert "quantized, no kernel x2: this CPU is too old" in str(found)
    assert found.leftover == {"dequantize_per_channel": 2, "dequantize_per_tensor": 2, "quantize_per_tensor": 2}


def test_bytes_by_hand() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    graphs = stages(model, torch.randn(4, 64))
    norm, bias = 2 * 32 * 4, 32 * 4
    found = {stage: qpass.report(gm) for stage, gm in graphs.items()}
    assert {report.bytes_before for report in found.values()} == {64 * 32 * 4 + bias + norm}
    assert found["prepared"].bytes_after == found["prepared"].bytes_before
    qparams = 32 * 4 + 32 * 4  # a scale and a zero point a channel: float32 and int32
    assert found["quantized"].bytes_after == 64 * 32 + qparams + bias + norm
    assert found["lowered"].bytes_after == found["quantized"].bytes_after  # packed weights, and not their codes too


def test_a_tied_weight_counts_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(32, 32, bias=False)
            self.b = nn.Linear(32, 32, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    prepared = qpass.prepare(Tied(), (torch.randn(4, 32),), config="int8_dynamic")
    found = qpass.report(prepared)
    assert found.bytes_before == found.bytes_after == 32 * 32 * 4


def test_masks_and_sizes_are_no_operations() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            keep = torch.arange(x.shape[0]).unsqueeze(-1) < x.shape[0] // 2
            first, _ = torch.chunk(self.fc(x).masked_fill(keep, 0.0), 2, -1)
            return first

    found = qpass.report(qpass.prepare(Masked(), (torch.randn(6, 8),), config="int8_dynamic"))
    assert [row.op for row in found.rows if row.outcome != "exact"] == ["linear", "masked_fill.Scalar", "chunk"]


def test_regions_are_counted_and_their_caller_is_not() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.a(y), lambda y: self.b(y).sin(), (x,))

    found = qpass.report(qpass.prepare(Branches(), (torch.randn(4, 8),), config="int8_dynamic"))
    assert sorted((row.op, row.module) for row in found.rows if row.outcome == "quantized") == [
        ("linear", "a"), ("linear", "b"),
    ]  # fmt: skip
    assert {"sin", "sum"} <= {row.op for row in found.rows if row.outcome == "float"}
    assert "cond" not in {row.op for row in found.rows}
    assert found.count("unaccounted") == 0


def test_several_graphs_make_one_report(graphs: dict[str, torch.fx.GraphModule]) -> None:
    one = qpass.report(graphs["quantized"])
    both = report_graphs([graphs["quantized"], graphs["quantized"]])
    assert both.graphs == 2
    assert both.count("quantized") == 2 * one.count("quantized")
    assert both.bytes_after == one.bytes_after  # the same tensors
    assert str(both).splitlines()[0] == "qpass report: quantized for x86, 2 graphs"


def test_compute_dtype_is_that_of_what_stays_in_float() -> None:
    config = qpass.presets.int8_static(compute_dtype=torch.bfloat16).keep_float(module="layers.1")
    graphs = stages(Net(), torch.randn(8, 16), config)
    for gm in graphs.values():
        dtypes = {row.op: row.compute_dtype for row in qpass.report(gm).rows if row.outcome == "float"}
        assert dtypes["linear"] == "bfloat16"
        assert dtypes["layer_norm"] == "float32"
    assert "what stays in float computes in: bfloat16 x" in str(qpass.report(graphs["lowered"]))


# Never silent


def test_what_the_configuration_excepts_is_told_and_not_missed() -> None:
    config = qpass.presets.int8_static().keep_float(module="layers.1")
    for gm in stages(Net(), torch.randn(8, 16), config).values():
        found = qpass.report(gm)
        kept = [row for row in found.rows if row.module == "layers.1" and row.op == "linear"]
        assert [(row.outcome, row.reason) for row in kept] == [
            ("float", "override 0 of the configuration leaves it in float")
        ]
        assert not any(row.missed for row in kept)


def test_a_lost_record_is_counted(graphs: dict[str, torch.fx.GraphModule]) -> None:
    del node_of(graphs["quantized"], "layer_norm").meta["qpass"]
    found = qpass.report(graphs["quantized"])
    assert (found.count(), found.count("float"), found.count("unaccounted")) == (4, 1, 1)
    assert "1 unaccounted" in str(found).splitlines()[1]
    assert [(row.op, row.module) for row in found.missed] == [("layer_norm", "norm")]
    with pytest.raises(StrictError) as raised:
        qpass.report(graphs["quantized"], strict=True)
    assert str(raised.value) == (
        "1 operations are not what the configuration asked for\n"
        "  where: norm (layer_norm): a pass replaced it and did not carry its record over\n"
        "  to do: accept that by config.keep_float(...), or ask for the report without strict=True"
    )


@needs_kernels
def test_a_quantized_operation_that_no_kernel_was_tried_for_is_told(graphs: dict[str, torch.fx.GraphModule]) -> None:
    node = node_of(graphs["lowered"], "onednn.qlinear_pointwise")
    record = record_of(node)
    assert record is not None
    set_record(node, record.but(outcome="quantized", reason="", kernel=""))
    found = qpass.report(graphs["lowered"])
    reason = "no pattern of the catalogue recognised its q/dq form, so no kernel was tried"
    assert [row.reason for row in found.missed] == [reason]


def test_only_what_the_configuration_asked_for_is_missed() -> None:
    declined = NodeRecord("linear", "float", reason="the weight is computed, not stored", pattern="linear")
    assert declined.but(asked=True).is_missed
    assert not declined.is_missed
    assert not NodeRecord("sin", "float", reason="no pattern of the catalogue covers it").is_missed
    assert not NodeRecord("relu", "quantized", reason="fused into linear").is_missed


def test_notes_are_told(graphs: dict[str, torch.fx.GraphModule]) -> None:
    gm = graphs["prepared"]
    graph_record(gm).notes.append("from a pass")
    gm.meta.setdefault("qpass_capture", {})["notes"] = ["from capture"]
    assert str(qpass.report(gm)).splitlines()[-2:] == ["note: from a pass", "note: from capture"]


# Inputs, data, and doing no harm


def test_sqnr_is_measured_against_the_reference() -> None:
    model, x = Net(), torch.randn(8, 16)
    quantized = stages(model, x)["quantized"]
    found = qpass.report(quantized, x, model)
    assert found.sqnr == qpass.sqnr(model, quantized, x)
    assert 20 < found.sqnr < 80  # 8 bits, two layers: neither equal nor broken
    assert f"  SQNR        {found.sqnr:.1f} dB" in str(found)
    assert "SQNR" not in str(qpass.report(quantized))


def test_a_model_without_inputs_is_reported_on_after_its_first_batch() -> None:
    prepared = qpass.prepare(Net().eval())
    with pytest.raises(CaptureError, match="has not seen a batch yet, so there is no graph"):
        qpass.report(prepared)
    prepared(torch.randn(8, 16))
    assert qpass.report(prepared).count("quantized") == 2


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"inputs": 1}, "report was given inputs but no reference"),
        ({"reference": abs}, "report was given reference but no inputs"),
    ],
)
def test_half_of_a_comparison_is_refused(arguments: dict[str, object], what: str) -> None:
    with pytest.raises(InputError) as raised:
        qpass.report(None, **arguments)
    assert str(raised.value) == f"{what}\n  to do: SQNR needs both, the rest needs neither"


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (nn.Linear(2, 2), "Linear"),
        (abs, "builtin_function_or_method"),
        (torch.fx.symbolic_trace(nn.ReLU()), "a captured graph"),
    ],
)
def test_what_holds_no_decision_is_refused(model: object, kind: str) -> None:
    with pytest.raises(InputError) as raised:
        qpass.report(model)
    assert str(raised.value) == (
        f"report takes a prepared, quantized or lowered graph, and this is {kind}\n"
        "  to do: call qpass.prepare on the model first"
    )


def test_the_report_as_data(graphs: dict[str, torch.fx.GraphModule]) -> None:
    found = qpass.report(graphs["lowered"], torch.randn(8, 16), graphs["lowered"])
    assert found.sqnr == math.inf
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["sqnr"] == "inf"
    assert plain["stage"] == "lowered"
    assert [Row(**row) for row in plain["rows"]] == list(found.rows)


def test_reporting_changes_nothing(graphs: dict[str, torch.fx.GraphModule]) -> None:
    for gm in graphs.values():
        before = graph_text(gm), {node.name: dict(node.meta) for node in gm.graph.nodes}, dict(gm.meta)
        first = str(qpass.report(gm))
        assert (graph_text(gm), {node.name: dict(node.meta) for node in gm.graph.nodes}, dict(gm.meta)) == before
        assert str(qpass.report(gm)) == first


def test_every_record_field_that_people_read_is_in_the_row() -> None:
    gm = stages(Net(), torch.randn(8, 16))["quantized"]
    node = node_of(gm, "layer_norm")
    set_record(node, NodeRecord("op", "float", "why", "island", "kernel", "a.b", "f.py:1: x", torch.float16, 4))
    (row,) = (row for row in qpass.report(gm).rows if row.node == node.name)
    assert row == Row("op", "a.b", "float", "kernel", "why", "island", "float16", "f.py:1: x", node.name, 4)
