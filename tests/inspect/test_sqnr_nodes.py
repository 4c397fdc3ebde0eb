"""Noise node by node: equal to the plain way of computing it, in little more memory than one forward."""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import qpass
from interpret import values
from qpass.capture.export import capture
from qpass.inspect import ranges
from qpass.inspect.sqnr_nodes import SqnrByNode
from qpass.ir.module import copy_graph_module
from qpass.spec.config import Config

aten = torch.ops.aten
quantized = torch.ops.quantized_decomposed
STATIC = qpass.presets.int8_static(compute_dtype=None)
EXTREMES = replace(  # quicker to convert than histograms
    STATIC, activation=qpass.QuantizationSpec(torch.uint8, symmetric=False, observer=qpass.observer.MinMaxObserver)
)


def stages(model: nn.Module, *inputs: Tensor, config: Config = EXTREMES) -> tuple[fx.GraphModule, fx.GraphModule]:
    prepared = qpass.prepare(torch.export.export(model.eval(), inputs), config=config)
    with torch.no_grad():
        prepared(*inputs)
    return prepared, qpass.convert(prepared)


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))


def test_equal_to_all_values_kept_and_compared() -> None:
    batches = [(torch.randn(8, 16),), (3 * torch.randn(8, 16),)]
    a, b = stages(net(), batches[0][0])
    found = qpass.sqnr(a, b, batches, nodes=True)
    sums: dict[str, list[Tensor]] = {}
    for batch in batches:
        left, right = ({n.name: v for n, v in values(gm, *batch).items()} for gm in (a, b))
        for name in ("linear", "gelu", "linear_1", "relu", "linear_2"):
            ref, x = left[name].double(), right[name].double()
            sums.setdefault(name, []).append(torch.stack([ref.square().sum(), (ref - x).square().sum()]))
    expected = {
        name: 10 * torch.log10(s[0] / s[1]).item() for name, parts in sums.items() if (s := sum(parts)) is not None
    }
    assert list(found) == list(expected)
    # sums of float64 in another order: 1e-12 relative
    assert dict(found) == pytest.approx(expected, rel=1e-9)
    assert found["linear_2"] == pytest.approx(qpass.sqnr(a, b, batches), rel=1e-9)


def test_what_each_node_adds() -> None:
    a, b = stages(net(), x := torch.randn(8, 16))
    found = qpass.sqnr(a, b, x, nodes=True)
    first = found.nodes[0]
    assert first.own == first.sqnr == found["linear"]
    gelu = next(noise for noise in found.nodes if noise.node.short == "gelu")
    added = 10 ** (-found["gelu"] / 10) - 10 ** (-found["linear"] / 10)
    assert gelu.own == (math.inf if added <= 0 else pytest.approx(-10 * math.log10(added)))
    worst = found.worst(3)
    assert [noise.sqnr for noise in worst] == sorted(found.values())[:3]
    assert found.costliest(1)[0].own == min(noise.own for noise in found.nodes)
    assert all(one.own <= other.own for one, other in zip(found.costliest(), found.costliest()[1:], strict=False))


def test_a_batch_norm_is_compared_behind_the_convolution_that_absorbed_it() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    model[1].running_mean += 5
    a, b = stages(model, x := torch.randn(2, 3, 8, 8))
    found = qpass.sqnr(a, b, x, nodes=True)
    conv = found.nodes[0]
    assert (conv.node.short, conv.reference.short) == ("conv2d", "batch_norm")
    assert conv.sqnr > 25  # against the convolution alone it is below 0


def test_infinities_that_agree_are_no_noise_and_others_are_all_noise() -> None:
    def graph(factor: float) -> fx.GraphModule:
        class Masked(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return torch.softmax(x.masked_fill(x < 0, -math.inf) * factor, -1)

        return capture(Masked(), (torch.ones(2, 4),))

    x = torch.tensor([[1.0, -1.0, 2.0, 3.0], [0.5, 1.0, -2.0, 0.0]])
    same = qpass.sqnr(graph(1.0), graph(1.0), x, nodes=True)
    assert set(same.values()) == {math.inf}
    other = qpass.sqnr(graph(1.0), graph(math.inf), x, nodes=True)
    assert other["masked_fill"] == math.inf
    assert other["mul"] == -math.inf


class Watch(TorchDispatchMode):
    """Bytes of the storages that operators made and that are alive, and the most there were."""

    def __init__(self, model: nn.Module, x: Tensor) -> None:
        super().__init__()
        # what there was before: an operator that returns an alias of it, as detach does of the input, made nothing
        self.alive = {tensor.untyped_storage()._cdata: 0 for tensor in (*model.parameters(), x)}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in self.alive:
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)


def test_memory_of_one_forward_and_a_half() -> None:
    """A chain of 200 operations whose values are larger than its weights: of each value two are alive in a forward, the
    one read and the one written; beside them only one of the other graph's, its codes, and small blocks."""
    model = nn.Sequential(*(nn.Linear(64, 64) if number % 2 else nn.ReLU() for number in range(200))).eval()
    x = torch.randn(8192, 64)
    reference, other = fx.symbolic_trace(model), fx.symbolic_trace(model)
    qparams = (0.02, 0, 0, 255, torch.uint8)
    for node in [node for node in other.graph.nodes if node.op == "call_module" and int(node.target) % 2 == 0]:
        with other.graph.inserting_after(node):
            codes = other.graph.call_function(quantized.quantize_per_tensor.default, (node, *qparams))
        with other.graph.inserting_after(codes):
            again = other.graph.call_function(quantized.dequantize_per_tensor.default, (codes, *qparams))
        node.replace_all_uses_with(again, lambda user, codes=codes: user is not codes)
    with torch.no_grad():
        with Watch(model, x) as plain:
            model(x)
        with Watch(model, x) as streaming:
            found = qpass.sqnr(reference, other, x, nodes=True)
    assert len(found) == 200
    assert sum(value < math.inf for value in found.values()) == 199
    assert plain.peak == 2 * x.nbytes
    assert streaming.peak + x.nbytes <= 1.5 * (plain.peak + x.nbytes)


def test_the_table_and_the_figure() -> None:
    a, b = stages(net(), x := torch.randn(8, 16))
    found = qpass.sqnr(a, b, x, nodes=True)
    assert isinstance(found, SqnrByNode)
    lines = str(found).splitlines()
    assert lines[0] == f"SQNR of 5 nodes, {sum(v == math.inf for v in found.values())} of them exact; the worst 5"
    assert lines[1].split() == ["node", "module", "operator", "dB", "own"]
    assert lines[3].split()[0] == min(found, key=lambda path: found[path])
    assert "<table" in found._repr_mimebundle_()["text/html"]
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra viz, is not installed")
    (axes,) = found.plot().axes
    assert list(axes.lines[0].get_ydata()) == list(found.values())


def test_a_module_is_captured_for_the_comparison() -> None:
    model = net().eval()
    x = torch.randn(8, 16)
    _, converted = stages(model, x)
    found = qpass.sqnr(model, converted, x, nodes=True)
    assert found["linear_2"] == pytest.approx(qpass.sqnr(model, converted, x), rel=1e-9)


def test_what_regions_hold_is_declined_and_their_result_compared() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: self.b(y).relu(), lambda y: self.b(y), (self.a(x),))

    x = torch.randn(4, 8)
    found = qpass.sqnr(*stages(Branches(), x, config=qpass.presets.int8_dynamic(compute_dtype=None)), x, nodes=True)
    assert "linear" in found
    assert math.isfinite(found["getitem"])  # the result of the region
    assert not any("/" in path for path in found)
    assert list(found.regions) == ["true_graph_0", "false_graph_0"]
    for region, count in found.regions.items():
        note = f"not compared: {count} operations in the region {region}, which runs as one; its result is"
        assert note in str(found).splitlines()
        assert note in found._repr_mimebundle_()["text/html"]


def test_ranges_of_observers() -> None:
    x = torch.cat([torch.linspace(-1, 1, 1600).reshape(100, 16), torch.full((1, 16), 8.0)])
    prepared, _ = stages(net(), x, config=STATIC)
    found = ranges(prepared)
    first = next(seen for seen in found if seen.module == "0" and not seen.weight)
    assert (first.low, first.high) == (-1.0, 8.0)
    assert sum(first.counts) == x.numel()
    assert first.counts[-1] == 16  # the outliers, alone in the last of the parts
    assert first.chosen[0] >= -1.01
    assert first.chosen[1] <= 8.01
    weights = [seen for seen in found if seen.weight]
    assert {seen.module for seen in weights} == {"0", "2", "4"}
    line = next(line for line in str(found).splitlines() if re.match(rf"{first.name} +0 +uint8", line))
    assert line.rstrip().endswith(("#", "+", "-", "=", "*", ":", "."))
    pytest.importorskip("matplotlib", reason="matplotlib, of the extra viz, is not installed")
    assert len(found.plot().axes) == len(found) - len(weights)


def test_ranges_of_a_model_in_training() -> None:
    """Of modules that round, too; and a batch norm stands between the first weight and its observer."""
    x = torch.randn(64, 3, 8, 8).clamp(-2, 2)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    prepared = qpass.prepare(model.train(), (x,), config=qpass.presets.int8_qat(compute_dtype=None))
    prepared(x)
    found = ranges(prepared)
    told = sorted((seen.module, seen.weight) for seen in found)
    assert told == [("0", False), ("0", True), ("3", False), ("4", True)]
    first = next(seen for seen in found if seen.module == "0" and not seen.weight)
    assert (first.low, first.high) == (-2.0, 2.0)
    module = prepared.get_submodule(first.name)
    values = module.eval()(torch.linspace(-9, 9, 100))
    assert first.chosen == (values.min(), values.max())


def test_graphs_are_left_as_they_are() -> None:
    a, b = stages(net(), x := torch.randn(8, 16))
    before = copy_graph_module(a), copy_graph_module(b)
    qpass.sqnr(a, b, x, nodes=True)
    assert not qpass.diff(before[0], a)
    assert not qpass.diff(before[1], b)


def test_a_batch_norm_in_front_of_a_convolution_is_found_behind_the_observer_between() -> None:
    layers = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)]
    model = nn.Sequential(*layers).eval()
    model[1].running_mean += 5
    model[3].running_mean += 5
    x = torch.randn(2, 3, 8, 8)
    a, b = stages(model, x)
    for reference in (model, a):
        found = qpass.sqnr(reference, b, x, nodes=True).nodes
        assert [one.reference.short for one in found if one.node.short == "conv2d"] == [
            "batch_norm", "batch_norm", "conv2d",
        ]  # fmt: skip
        assert min(one.sqnr for one in found) > 25  # against a convolution alone it is below 0
