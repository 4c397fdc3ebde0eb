from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pipeline_run import Do
from qpass.capture.export import capture
from qpass.ir.expression import Expr, Var, aten, build
from qpass.ir.match import Match, Matcher, argument_names, normalized


def last(function: Callable[..., Tensor], inputs: int = 2) -> fx.Node:
    """The last operation of a function of 4 x 4 matrices."""
    gm = capture(Do(lambda m, *given: function(*given)), tuple(torch.randn(4, 4) for _ in range(inputs)))
    (result,) = gm.graph.output_node().all_input_nodes
    return result


def matched(pattern: Callable[..., Any], function: Callable[..., Tensor], inputs: int = 2) -> Match | None:
    return Matcher(pattern).match(last(function, inputs))


def test_a_pattern_function_becomes_an_expression_of_its_parameters() -> None:
    (expr,) = build(lambda x, w: aten.relu(aten.mm(x, w)))
    assert expr.op is torch.ops.aten.relu.default
    (inner,) = expr.args
    assert isinstance(inner, Expr)
    assert [(type(arg), arg.name) for arg in inner.args] == [(Var, "x"), (Var, "w")]


def test_captures_and_nodes_of_a_match() -> None:
    m = matched(lambda x, w: aten.relu(aten.mm(x, w)), lambda a, b: torch.relu(torch.mm(a, b)))
    assert m is not None
    assert [node.name for node in m.nodes] == ["mm", "relu"]  # inputs first
    assert (m.root.name, m.x.name, m.w.name) == ("relu", "inputs_0", "inputs_1")
    with pytest.raises(AttributeError, match="this match has no capture 'y'"):
        _ = m.y


def test_alternatives_are_tried_in_order_and_index_their_roots() -> None:
    matcher = Matcher(lambda x, y: [aten.add.Tensor(x, y), aten.sub.Tensor(x, y)])
    assert matcher.roots == {torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor}
    for function, name in ((torch.add, "add"), (torch.sub, "sub")):
        m = matcher.match(last(function))
        assert m is not None
        assert m.root.name == name


def test_the_same_capture_twice_binds_the_same_thing() -> None:
    def square(x: Any) -> Expr:
        return aten.mul.Tensor(x, x)

    assert matched(square, lambda a, b: a * a) is not None
    assert matched(square, lambda a, b: a * b) is None


def test_literals_must_be_equal_defaults_included() -> None:
    def plain_sum(x: Any, y: Any) -> Expr:
        return aten.add.Tensor(x, y, alpha=1)

    assert matched(plain_sum, lambda a, b: a + b) is not None  # the graph does not spell alpha
    assert matched(plain_sum, lambda a, b: torch.add(a, b, alpha=2)) is None


def test_what_a_pattern_does_not_mention_may_be_anything() -> None:
    m = matched(lambda x, y: aten.add.Tensor(x, y), lambda a, b: torch.add(a, b, alpha=2))
    assert m is not None


def test_a_literal_can_be_captured() -> None:
    m = matched(lambda x, low, high: aten.clamp(x, low, high), lambda a, b: a.clamp(-1, 2) + 0 * b)
    assert m is None  # the root is the sum
    m = matched(lambda x, low, high: aten.clamp(x, low, high), lambda a: a.clamp(-1, 2), inputs=1)
    assert m is not None
    assert (m.low, m.high) == (-1, 2)


def test_an_inner_node_that_others_read_cannot_be_absorbed() -> None:
    def relu_of_product(x: Any, w: Any) -> Expr:
        return aten.relu(aten.mm(x, w))

    model = Do(lambda m, a, b: (torch.relu(y := torch.mm(a, b)), y))
    gm = capture(model, (torch.randn(4, 4), torch.randn(4, 4)))
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    assert Matcher(relu_of_product).match(relu) is None
    assert Matcher(lambda y: aten.relu(y)).match(relu) is not None  # the root may have any number of readers


def test_captures_can_be_fixed_beforehand() -> None:
    node = last(lambda a, b: a + b)
    matcher = Matcher(lambda y, other: aten.add.Tensor(y, other))
    first, second = node.args
    assert matcher.match(node, {"y": first}) is not None
    assert matcher.match(node, {"y": second}) is None


def test_arguments_by_name_with_their_defaults() -> None:
    node = last(lambda a, b: torch.add(a, b, alpha=3))
    assert argument_names(torch.ops.aten.add.Tensor) == ("self", "other", "alpha")
    assert normalized(node) == {"self": node.args[0], "other": node.args[1], "alpha": 3}
    conv = capture(torch.nn.Conv2d(1, 1, 3, bias=False), (torch.randn(1, 1, 4, 4),))
    (node,) = conv.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    given = normalized(node)
    assert (given["bias"], given["stride"], given["padding"], given["groups"]) == (None, [1, 1], [0, 0], 1)
