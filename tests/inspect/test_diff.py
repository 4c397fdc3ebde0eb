"""A diff as a value: what it counts, how it groups, what narrower ones hold, what it asserts."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from qpass.capture.export import capture
from qpass.errors import InputError
from qpass.inspect.diff import GraphDiff
from qpass.inspect.snapshot import snapshot
from qpass.ir.module import copy_graph_module

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Net(nn.Module):
    def __init__(self, layers: int = 3, hidden: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(hidden) for _ in range(layers))
        self.head = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Stages(NamedTuple):
    captured: fx.GraphModule
    prepared: fx.GraphModule
    quantized: fx.GraphModule


@pytest.fixture(scope="module")
def stages() -> Stages:
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    graph = capture(Net().eval(), (x,))
    prepared = qpass.prepare(graph, config=qpass.presets.int8_static(compute_dtype=None))
    with torch.no_grad():
        prepared(x)
    return Stages(graph, prepared, qpass.convert(prepared))


def test_nothing_differs_from_itself(stages: Stages) -> None:
    for gm in stages:
        for other in (gm, copy_graph_module(gm)):
            found = qpass.diff(gm, other)
            assert not found
            assert (found.added, found.removed, found.rewired, found.retargeted, found.edits) == ((), (), (), (), ())
            assert len(found.matched) == len(gm.graph.nodes)
            assert str(found).splitlines()[1] == f"  no change in {len(gm.graph.nodes)} nodes"


def test_backwards_what_was_added_is_removed(stages: Stages) -> None:
    for a, b in ((stages.captured, stages.prepared), (stages.prepared, stages.quantized)):
        there, back = qpass.diff(a, b), qpass.diff(b, a)
        assert there.added == back.removed
        assert there.removed == back.added
        assert there.rewired == tuple((old, new) for new, old in back.rewired)
        assert len(there.added) > 0


def test_the_counts_are_those_of_the_graphs(stages: Stages) -> None:
    found = qpass.diff(stages.prepared, stages.quantized)
    observers = [node for node in stages.prepared.graph.nodes if node.op == "call_module"]
    quantize = [node for node in stages.quantized.graph.nodes if "quantized_decomposed" in str(node.target)]
    weights = [view for view in found.removed if view.op == "get_attr"]
    assert len(found.removed) == len(observers) + len(weights)
    assert len(weights) == 7  # each linear's; its codes, scale and zero point come instead
    assert len(found.added) == len(quantize) + 3 * 7
    assert len(found.matched) + len(found.removed) == len(stages.prepared.graph.nodes)
    assert found.ops["quantize_per_tensor"] == (
        0,
        sum(str(n.target)[21:] == "quantize_per_tensor.default" for n in quantize),
    )
    assert found.before.constant_bytes == sum(p.numel() * 4 for p in stages.captured.parameters())


def test_many_layers_are_few_edits(stages: Stages) -> None:
    found = qpass.diff(stages.prepared, stages.quantized)
    edits = {edit.pattern: edit for edit in found.edits}
    assert edits.keys() == {"layers.{0..2}.up", "layers.{0..2}.down", "head"}
    assert [len(edit.instances) for edit in found.edits] == [3, 3, 1]
    up = edits["layers.{0..2}.up"]
    assert up.text == (
        ("linear(observe(x), observe(weight), bias)",), ("linear(dq(q(x)), dq(weight_codes), bias)",)
    )  # fmt: skip
    assert up.passes == ("lower_observers",)
    assert sum(len(instance.changes) for edit in found.edits for instance in edit.instances) == len(found.changes)


def test_narrower_diffs(stages: Stages) -> None:
    found = qpass.diff(stages.prepared, stages.quantized)
    layer = found.module("layers.0.*")
    assert {instance.module for instance in layer.instances} == {"layers.0.up", "layers.0.down"}
    assert 0 < len(layer.added) < len(found.added)
    assert all(old.module.startswith("layers.0") or new.module.startswith("layers.0") for old, new in layer.matched)
    assert found.op("quantized_decomposed.dequantize_per_channel").instances == found.instances
    assert found.op("aten.linear").instances == found.instances
    assert not found.op("aten.conv2d")
    assert found.passes["lower_observers"].instances == found.instances
    with pytest.raises(
        InputError, match=r"no pass 'lower_observer' made a node here \(did you mean 'lower_observers'\?\)"
    ):
        found.passes["lower_observer"]


def test_rewired_and_retargeted(stages: Stages) -> None:
    other = copy_graph_module(stages.captured)
    relu = next(node for node in other.graph.nodes if node.target is aten.relu.default)
    relu.target = aten.gelu.default
    norm = next(node for node in other.graph.nodes if node.target is aten.layer_norm.default)
    norm.args = (*norm.args[:4], 1e-3, *norm.args[5:])
    add = [node for node in other.graph.nodes if node.target is aten.add.Tensor][1]
    add.args = (add.args[1], add.args[0])
    found = qpass.diff(stages.captured, other)
    assert [(old.name, new.short) for old, new in found.retargeted] == [("relu", "gelu")]
    assert {new.name for _, new in found.rewired} == {norm.name, add.name}
    texts = {edit.text for edit in found.edits}
    assert (("relu(x)",), ("gelu(x)",)) in texts
    norms = "layer_norm(x, [16], weight, bias, {}, False)"
    assert ((norms.format("1e-05"),), (norms.format("0.001"),)) in texts
    assert (("add(x, y)",), ("add(y, x)",)) in texts


def test_assert_only(stages: Stages) -> None:
    found = qpass.diff(stages.captured, stages.prepared)
    found.assert_only(added=["*Observer"])
    with pytest.raises(AssertionError, match=r"added: activation_post_process_\d+ \(HistogramObserver\)"):
        found.assert_only(added=["PerChannel*"])
    with pytest.raises(AssertionError, match=r"nothing was removed that matches 'aten.relu'"):
        found.assert_only(added=["*Observer"], removed=["aten.relu"])
    with pytest.raises(AssertionError, match=r"rewired: linear \(aten.linear.default\)"):
        found.assert_only(added=["*Observer"], rewired=["aten.add"])
    qpass.diff(stages.captured, stages.captured).assert_only()


def test_a_metric_beside_its_nodes(stages: Stages) -> None:
    found = qpass.diff(stages.prepared, stages.quantized)
    inputs = torch.randn(4, 16)
    noise = qpass.sqnr(stages.prepared, stages.quantized, inputs, nodes=True)
    shown = found.with_metric("sqnr", noise)
    assert found.metrics == {}
    head = next(view for view in found.after.nodes if view.module == "head" and view.short == "linear")
    assert f"[3] head   sqnr {noise[head.path]:.1f}   by lower_observers" in str(shown)
    assert json.loads(shown.to_json())["metrics"]["sqnr"][head.path] == noise[head.path]
    assert found.with_metric("x", {head: 3.0}).metrics["x"] == {head.path: 3.0}


def test_refusals_have_their_reasons() -> None:
    """An embedding whose rows are used twice, say; here a linear whose weight is computed."""

    class Computed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            return nn.functional.linear(self.fc(x), w)

    inputs = (torch.randn(4, 16), torch.randn(16, 16))
    prepared = qpass.prepare(Computed().eval(), inputs)
    with torch.no_grad():
        prepared(*inputs)
    found = qpass.diff(prepared, qpass.convert(prepared))
    assert [op for op, _ in found.refusals] == ["linear"]
    (reason,) = (reason for _, reason in found.refusals)
    assert f"not done: linear x1: {reason}" in str(found)
    assert qpass.report(prepared).missed[0].reason == reason


def test_bytes_given_to_collectives() -> None:
    """Graphs put together by hand: a collective that sends floats, and one that sends their codes."""
    import torch.distributed

    def graph(dtype: torch.dtype) -> fx.GraphModule:
        result = fx.Graph()
        x = result.placeholder("x")
        x.meta["val"] = torch.empty(8, 32, dtype=dtype, device="meta")
        sent = result.call_function(torch.ops._c10d_functional.all_gather_into_tensor.default, (x, 2, "0"))
        result.output(result.call_function(torch.ops._c10d_functional.wait_tensor.default, (sent,)))
        return fx.GraphModule(nn.Module(), result)

    a, b = graph(torch.float32), graph(torch.uint8)
    assert (snapshot(a).sent_bytes, snapshot(b).sent_bytes) == (1024, 256)
    gather = next(node for node in b.graph.nodes if node.op == "call_function")
    gather.args = (gather.args[0], 4, "0")
    assert "  sent        1.02 kB -> 256 bytes a rank and call" in str(qpass.diff(a, b))


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a graph is needed, and this is Linear"):
        qpass.diff(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(InputError, match="there is no file"):
        qpass.diff(tmp_path / "a.pt2", tmp_path / "b.pt2")
    (tmp_path / "a.pt2").write_text("no program")
    with pytest.raises(InputError, match="holds no exported program that can be opened"):
        qpass.diff(tmp_path / "a.pt2", tmp_path / "a.pt2")


def test_a_diff_keeps_no_weight_alive() -> None:
    import gc
    import weakref

    x = torch.randn(4, 16)
    prepared = qpass.prepare(torch.export.export(Net().eval(), (x,)))
    with torch.no_grad():
        prepared(x)
    quantized = qpass.convert(prepared)
    found = qpass.diff(prepared, quantized)
    weights = [weakref.ref(tensor) for gm in (prepared, quantized) for tensor in (*gm.parameters(), *gm.buffers())]
    del prepared, quantized
    gc.collect()
    assert [ref() for ref in weights if ref() is not None] == []
    assert "distinct" in str(found)


def test_other_programs_read_it(stages: Stages, tmp_path: Path) -> None:
    found = qpass.diff(stages.prepared, stages.quantized).with_metric("sq nr", {"linear": float("inf")})
    told: dict[str, Any] = json.loads(found.to_json())
    assert [node["name"] for node in told["added"]] == [view.path for view in found.added]
    assert told["edits"][0]["places"][0] == ["layers.0.up", "linear"]

    found.to_model_explorer(tmp_path)
    graphs = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("before", "after")}
    ids = {name: {node["id"] for node in graph["graphs"][0]["nodes"]} for name, graph in graphs.items()}
    assert [len(ids[name]) for name in ("before", "after")] == [len(found.before), len(found.after)]
    sources = {edge["sourceNodeId"] for node in graphs["after"]["graphs"][0]["nodes"] for edge in node["incomingEdges"]}
    assert sources <= ids["after"]
    mapping = json.loads((tmp_path / "mapping.json").read_text())["mapping"]
    assert set(mapping) <= ids["before"]
    assert set(mapping.values()) <= ids["after"]
    assert len(mapping) == len(found.matched)
    assert json.loads((tmp_path / "sq_nr.json").read_text())["after"]["results"] == {"linear": {"value": "inf"}}

    dot = found.to_dot()
    assert dot.count("subgraph") == len(found.edits)
    assert dot.count("{") == dot.count("}")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_colour_on_a_terminal_alone(stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich, of the extra viz, is not installed")
    found = qpass.diff(stages.prepared, stages.quantized)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured, plain, file = Terminal(), Terminal(), io.StringIO()
    found.show(coloured)
    assert "\x1b[32m" in coloured.getvalue()  # green
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured.getvalue()) == f"{found}\n"
    monkeypatch.setenv("NO_COLOR", "1")
    found.show(plain)
    found.show(file)
    assert plain.getvalue() == file.getvalue() == f"{found}\n"


def test_the_type_is_a_value(stages: Stages) -> None:
    found = qpass.diff(stages.prepared, stages.quantized)
    assert isinstance(found, GraphDiff)
    assert repr(found).startswith("<GraphDiff: ")
    assert repr(found).endswith("; 3 distinct edits>")


def test_steps_of_an_unrolled_loop_are_one_line_with_a_count() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.g = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x.new_zeros(x.shape[0], 4)
            for step in range(x.shape[1]):
                h = self.g(torch.cat([x[:, step], h], 1)).tanh()
            return h

    prepared = qpass.prepare(Loop().eval(), (x := torch.randn(2, 20, 2),))
    prepared(x)
    found = qpass.diff(prepared, qpass.convert(prepared))
    lines = str(found).splitlines()
    assert "    - select(observe(x))  x20" in lines
    assert "    + select(dq(q(x)))  x20" in lines
    assert len(lines) < 60  # each step in a line of its own is 40 more
    assert "select(dq(q(x)))  x20" in found.to_json()
    assert "select(dq(q(x)))  x20" in found._repr_mimebundle_()["text/html"]
