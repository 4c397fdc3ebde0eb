from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import fx, nn

from pipeline_run import PER_TOKEN, STATIC, Do, run_stages
from qpass.capture.export import capture
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr, aten
from qpass.ir.rule import Refusal, require
from qpass.islands.island import (
    ACTIVATION,
    FLOAT,
    WEIGHT,
    Island,
    IslandMatch,
    Specs,
    codes_of,
    quantized_operands,
)
from qpass.patterns import Linear
from qpass.patterns.epilogues import add, relu
from qpass.spec import PerTensor, PerToken, QuantizationSpec
from qpass.targets import Kernel, Output, Target

LINEAR = torch.ops.aten.linear.default
FUSIONS = {(), ("relu",), ("add",), ("add", "relu")}


class OnlyStatic(Kernel):
    """Takes static activations, alone or with a relu."""

    name = "only static"
    fusions = frozenset({(), ("relu",)})

    def check(self, m: IslandMatch, specs: Specs) -> None:
        require(not specs["x"].dynamic, "it takes static activations")


class Relu(Kernel):
    """Must be followed by a relu, and writes to nobody without readers."""

    name = "relu"
    fusions = frozenset({("relu",)})

    def output(self, m: IslandMatch) -> Output:
        require(m.output.users, "nothing reads the result")
        require(not any(user.op == "output" for user in m.output.users), "the result leaves the graph")
        return Output(m.output, torch.uint8)


class Product(Island):
    """relu(linear(dq(x), dq(w), b) + other)  ->  nothing real"""

    name = "product"
    operands: ClassVar = {"x": ACTIVATION, "w": WEIGHT(axis=0), "b": FLOAT}
    epilogues = (relu, add)

    def pattern(self, x: Any, w: Any, b: Any) -> Expr:
        return aten.linear(x, w, b)


def matches(model: nn.Module, fusions: set[tuple[str, ...]] = FUSIONS, inputs: int = 2) -> list[IslandMatch]:
    gm = capture(model.eval(), tuple(torch.randn(4, 8) for _ in range(inputs)))
    return list(Product().matches(next(iter(gm.graph.find_nodes(op="call_function", target=LINEAR))), fusions))


def block(function: Any) -> nn.Module:
    return Do(function, a=nn.Linear(8, 8))


def test_the_longest_chain_comes_first() -> None:
    found = matches(block(lambda m, x, y: torch.relu(m.a(x) + y)))
    assert [m.fused for m in found] == [("add", "relu"), ("add",), ()]
    longest = found[0]
    assert [node.name for node in longest.nodes] == ["linear", "add", "relu"]
    assert (longest.root.name, longest.output.name) == ("linear", "relu")
    assert (longest.x.name, longest.other.name) == ("inputs_0", "inputs_1")
    assert {name: operand.role for name, operand in longest.operands.items()} == {
        "x": "activation", "w": "weight", "b": "float", "other": "float",
    }  # fmt: skip


def test_chains_that_no_kernel_runs_are_not_offered() -> None:
    model = block(lambda m, x, y: torch.relu(m.a(x) + y))
    assert [m.fused for m in matches(model, {(), ("add", "relu")})] == [("add", "relu"), ()]
    assert [m.fused for m in matches(model, {(), ("relu",)})] == [()]
    assert matches(model, {("relu",)}) == []


def test_an_absent_bias_is_no_operand() -> None:
    (m,) = matches(Do(lambda m, x, y: m.a(x) * y, a=nn.Linear(8, 8, bias=False)))
    assert m.b is None
    assert "b" not in m.operands


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x, y: (torch.relu(z := m.a(x)), z),  # a second reader
        lambda m, x, y: (z := m.a(x)) + z,  # read twice by one node
        lambda m, x, y: torch.relu(torch.sin(m.a(x))),  # another operation between
    ],
)
def test_what_cannot_be_fused(function: Any) -> None:
    assert [m.fused for m in matches(block(function))] == [()]


def test_a_node_that_another_island_took_is_left_alone() -> None:
    gm = capture(block(lambda m, x, y: torch.relu(m.a(x))), (torch.randn(4, 8), torch.randn(4, 8)))
    linear, relu_node = (n for n in gm.graph.nodes if n.name in ("linear", "relu"))
    assert [m.fused for m in Product().matches(linear, FUSIONS, {relu_node})] == [()]
    assert list(Product().matches(linear, FUSIONS, {linear})) == []


HERE = Target("here", "cpu", {Product: (Relu(), OnlyStatic())})
STATIC_X = {"x": QuantizationSpec(torch.uint8, PerTensor(), symmetric=False)}
DYNAMIC_X = {"x": QuantizationSpec(torch.int8, PerToken(), dynamic=True)}


def test_the_first_kernel_that_accepts_runs_it() -> None:
    with_relu, plain = matches(block(lambda m, x, y: torch.relu(m.a(x))), HERE.fusions(Product()))
    assert HERE.fusions(Product()) == {(), ("relu",)}
    assert HERE.kernel_for(with_relu, STATIC_X)[0].name == "relu"
    assert HERE.kernel_for(plain, STATIC_X)[0].name == "only static"


def test_what_a_kernel_asks_of_its_readers_is_checked_when_the_graph_is_final() -> None:
    with_relu, _ = matches(block(lambda m, x, y: torch.relu(m.a(x))), HERE.fusions(Product()))
    assert HERE.kernel_for(with_relu, STATIC_X, final=True)[0].name == "only static"
    with pytest.raises(Refusal) as refused:
        HERE.kernel_for(with_relu, DYNAMIC_X, final=True)
    assert refused.value.reason == "the result leaves the graph; it takes static activations"


def test_a_target_without_kernels_is_named() -> None:
    with pytest.raises(Refusal) as refused:
        Target("there", "cpu", {}).kernel_for(matches(block(lambda m, x, y: m.a(x)))[0], STATIC_X)
    assert refused.value.reason == "there has no int8 kernel for product"


@pytest.mark.parametrize(("config", "quantized"), [(STATIC, {"x", "w"}), (PER_TOKEN, {"x", "w"})])
def test_the_quantized_form_is_derived(config: Any, quantized: set[str]) -> None:
    gm = run_stages(block(lambda m, x: torch.relu(m.a(x))), torch.randn(4, 8), config=config).quantized
    (node,) = gm.graph.find_nodes(op="call_function", target=LINEAR)
    m = next(Linear().matches(node, {()}))
    assert set(quantized_operands(m)) == quantized
    assert codes_of(m, "w").target == "a.weight_codes"
    assert codes_of(m, "x").meta["val"].dtype == quantized_operands(m)["x"].dtype


def test_an_island_that_is_not_quantized_has_no_quantized_form() -> None:
    (m,) = matches(block(lambda m, x, y: m.a(x)))
    assert quantized_operands(m) == {}
    with pytest.raises(AssertionError, match="x is not quantized"):
        codes_of(m, "x")


def test_a_kernel_must_say_how_it_is_emitted() -> None:
    (m,) = matches(block(lambda m, x, y: m.a(x)))
    with pytest.raises(NotImplementedError):
        OnlyStatic().emit(m, Output(m.output), Editor(fx.GraphModule({}, fx.Graph())))
