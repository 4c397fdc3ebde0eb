from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from interpret import operators
from pipeline_run import Do
from qpass.capture.export import capture
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr, aten
from qpass.ir.match import Match
from qpass.ir.rule import Refusal, Rule, apply_rules, require


class NegatedDifference(Rule):
    """-(x - y)  ->  y - x

    Exact: IEEE subtraction is antisymmetric.
    """

    def pattern(self, x: Any, y: Any) -> Expr:  # type: ignore[override]
        return aten.neg(aten.sub.Tensor(x, y))

    def check(self, m: Match, constants: Constants) -> None:
        require(isinstance(m.y, fx.Node), "a number has no negative to subtract from")
        require(m.y not in constants, "the second operand is stored", m.y)

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        return edit.call(torch.ops.aten.sub.Tensor, m.y, m.x, like=m.root, before=m.root)


class DoubleNegative(Rule):
    """--x  ->  x"""

    def pattern(self, x: Any) -> Expr:  # type: ignore[override]
        return aten.neg(aten.neg(x))

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        return m.x  # type: ignore[no-any-return]


def captured(function: Callable[..., Any], **members: Any) -> fx.GraphModule:
    return capture(Do(function, **members), (torch.randn(4, 4), torch.randn(4, 4)))


def test_a_rule_fires_once_and_then_never_again() -> None:
    gm = captured(lambda m, a, b: torch.relu(-(a - b)))
    inputs = torch.randn(4, 4), torch.randn(4, 4)
    before = gm(*inputs)
    applied = apply_rules(gm, [NegatedDifference()], "test")
    assert (applied.count, applied.fired, applied.refused) == (1, {"NegatedDifference": 1}, [])
    gm.graph.lint()
    gm.recompile()
    assert (
        operators(gm)
        == """\
inputs_0 = input
inputs_1 = input
sub_tensor = sub.Tensor(inputs_1, inputs_0)
relu = relu(sub_tensor)
return [relu]"""
    )
    assert torch.equal(gm(*inputs), before)
    assert apply_rules(gm, [NegatedDifference()], "test").count == 0


def test_a_refusal_leaves_the_graph_and_says_why_and_where() -> None:
    gm = captured(lambda m, a, b: -(a - m.w) + -(a - 2), w=nn.Parameter(torch.ones(4, 4)))
    before = operators(gm)
    applied = apply_rules(gm, [NegatedDifference()], "test")
    assert applied.count == 0
    assert [(rule, node.name, reason) for rule, node, reason in applied.refused] == [
        ("NegatedDifference", "w", "the second operand is stored"),  # the node that `require` names
        ("NegatedDifference", "neg_1", "a number has no negative to subtract from"),  # else the root
    ]
    assert applied.nearest_miss == "NegatedDifference declined neg_1: a number has no negative to subtract from"
    assert operators(gm) == before
    assert apply_rules(gm, [DoubleNegative()], "test").nearest_miss == "no rule matched"


def test_one_walk_finds_what_it_made() -> None:
    gm = captured(lambda m, a, b: torch.neg(torch.neg(torch.neg(a - b))))
    applied = apply_rules(gm, [NegatedDifference(), DoubleNegative()], "test")
    assert applied.fired == {"NegatedDifference": 3}  # each sign meets the difference that the sign before it left
    (left,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
    assert [node.name for node in left.args] == ["inputs_1", "inputs_0"]


def test_the_first_rule_that_accepts_wins() -> None:
    class Never(DoubleNegative):
        def check(self, m: Match, constants: Constants) -> None:
            require(False, "never")

    class Second(DoubleNegative):
        pass

    gm = captured(lambda m, a, b: torch.neg(torch.neg(a)) + b)
    applied = apply_rules(gm, [Never(), DoubleNegative(), Second()], "test")
    assert applied.fired == {"DoubleNegative": 1}
    assert [reason for _, _, reason in applied.refused] == ["never"]


def test_what_a_rewrite_leaves_unread_is_erased_and_what_others_read_stays() -> None:
    gm = captured(lambda m, a, b: (torch.neg(torch.neg(a)), torch.sin(b)))
    apply_rules(gm, [DoubleNegative()], "test")
    assert operators(gm).splitlines()[2:] == ["sin = sin(inputs_1)", "return [inputs_0, sin]"]


def test_new_nodes_know_where_they_come_from() -> None:
    gm = captured(lambda m, a, b: -(a - b))
    (neg,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.neg.default)
    trace, stack = neg.meta["stack_trace"], neg.meta["nn_module_stack"]
    apply_rules(gm, [NegatedDifference()], "a_pass")
    (new,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sub.Tensor)
    assert (new.meta["stack_trace"], new.meta["nn_module_stack"]) == (trace, stack)
    assert (new.meta["from_node"][0].name, new.meta["from_node"][0].pass_name) == ("neg", "a_pass")
    assert new.meta["val"].dtype == torch.float32


def test_a_rule_states_its_law_and_compiles_its_pattern_once() -> None:
    rule = NegatedDifference()
    assert rule.law == "-(x - y)  ->  y - x"
    assert rule.name == "NegatedDifference"
    assert rule.matcher() is rule.matcher()


def test_require() -> None:
    require(True, "never said")
    with pytest.raises(Refusal) as refused:
        require([], "it is empty")
    assert (refused.value.reason, refused.value.node) == ("it is empty", None)


@pytest.mark.parametrize("length", [100, 300])
def test_one_walk_looks_at_each_root_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: the matcher is asked once for each node at whose operator a rule is rooted."""

    def chain(m: Do, a: Tensor, b: Tensor) -> Tensor:
        for _ in range(length):
            a = -torch.sin(a)
        return a

    gm = captured(chain)
    rule, asked = DoubleNegative(), []
    match = rule.matcher().match
    monkeypatch.setattr(rule.matcher(), "match", lambda node: asked.append(node) or match(node))
    assert apply_rules(gm, [rule], "test").count == 0
    assert len(asked) == length
