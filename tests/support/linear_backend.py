"""A backend as small as one can be: every linear with a stored weight becomes a packed int8 kernel, nothing else does.

It stands between Dynamo and Inductor in the tests of that seam, where qpass's own passes would only be in the way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.backend.inductor import compile_lowered
from qpass.capture.dynamo import from_dynamo
from qpass.ir.attributes import get_constant
from qpass.ir.editor import Editor
from qpass.ir.origins import Derived
from qpass.ir.region_edits import sink_constants
from qpass.ir.regions import regions

aten, onednn = torch.ops.aten, torch.ops.onednn
SCALE, ZERO_POINT = 0.05, 128


def weight_scale(weight: Tensor) -> Tensor:
    return (weight.abs().amax(1) / 127).clamp(min=1e-8)


def pack(weight: Tensor) -> Tensor:
    codes = torch.round(weight / weight_scale(weight)[:, None]).clamp(-127, 127).to(torch.int8)
    return onednn.qlinear_prepack(codes, None)


def qlinear(x: Tensor, layer: nn.Linear) -> Tensor:
    """What the backend below makes of ``layer(x)``, eagerly and from the weights of this moment."""
    codes = torch.round(x / SCALE).add(ZERO_POINT).clamp(0, 255).to(torch.uint8)
    weight, zero_points = layer.weight.detach(), torch.zeros(layer.out_features, dtype=torch.int64)
    return onednn.qlinear_pointwise(
        codes, SCALE, ZERO_POINT, pack(weight), weight_scale(weight), zero_points, layer.bias.detach(),
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip


def lower_linears(gm: fx.GraphModule) -> fx.GraphModule:
    """``linear(x, get_attr w, b) -> qlinear(quantize(x), get_attr packed, ...)``, also in regions."""
    for region in list(regions(gm)):
        edit = Editor(region)
        for node in region.graph.find_nodes(op="call_function", target=aten.linear.default):
            x, w, b = node.args
            if w.op == "get_attr":
                place = {"like": node, "before": node}
                weight = get_constant(region, w.target).detach()
                packed = derive(edit, w.target, "packed", pack, node)
                scale = derive(edit, w.target, "scale", weight_scale, node)
                zero_point = edit.constant("zero_point", torch.zeros(len(weight), dtype=torch.int64), **place)
                q = edit.call(aten.div.Tensor, x, SCALE, **place)
                q = edit.call(aten.round.default, q, **place)
                q = edit.call(aten.add.Tensor, q, ZERO_POINT, **place)
                q = edit.call(aten.clamp.default, q, 0, 255, **place)
                q = edit.call(aten.to.dtype, q, torch.uint8, **place)
                y = edit.call(
                    onednn.qlinear_pointwise.default, q, SCALE, ZERO_POINT, packed, scale, zero_point, b,
                    1.0, 0, torch.float32, "none", [], "", **place,
                )  # fmt: skip
                node.replace_all_uses_with(y)
        region.graph.eliminate_dead_code()
        region.recompile()
    return gm


def derive(edit: Editor, source: str, suffix: str, compute: Callable[[Tensor], Tensor], at: fx.Node) -> fx.Node:
    value = compute(get_constant(edit.gm, source).detach())
    return edit.constant(f"{source}_{suffix}", value, like=at, before=at, derived=Derived((source,), compute))


class Backend:
    """Captures, lowers every linear, compiles; counts how often."""

    def __init__(self, **options: Any) -> None:
        self.options, self.compilations = options, 0

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.compilations += 1
        capture = from_dynamo(gm, example_inputs)
        sink_constants(capture.graph_module)
        lowered = lower_linears(capture.graph_module)
        return compile_lowered(lowered, example_inputs, capture=capture, decompositions={}, **self.options)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(32, 16), nn.LayerNorm(16), nn.Linear(16, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x).relu()))

    def expected(self, x: Tensor) -> Tensor:
        return qlinear(self.norm(qlinear(x, self.a).relu()), self.b)


def assert_same(got: Tensor, expected: Tensor) -> None:
    # One rounding of layer norm done otherwise may move a code, and a code moves the output by about 0.05 * weight.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05)
    assert (got != expected).float().mean() < 0.01


def assert_equal(got: Tensor, expected: Tensor) -> None:
    assert torch.equal(got, expected)
