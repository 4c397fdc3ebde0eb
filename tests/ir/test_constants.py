from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pipeline_run import Do
from qpass.capture.export import capture
from qpass.ir.constants import Constants, expression, is_pure
from qpass.ir.origins import Derived, derived_constants


def captured(function: Callable[..., Any]) -> fx.GraphModule:
    model = Do(function, w=nn.Parameter(torch.randn(4, 4)), v=nn.Parameter(torch.randn(4)))
    return capture(model, (torch.randn(4, 4),))


def nodes(gm: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in gm.graph.nodes}


def test_what_reads_parameters_alone_is_constant() -> None:
    gm = captured(lambda m, x: torch.mm(x, (m.w * m.v).t()) + m.v)
    constants = Constants(gm)
    found = {name for name, node in nodes(gm).items() if node in constants}
    assert found == {"w", "v", "mul", "t"}
    assert "text" not in constants


def test_values_are_computed_and_a_bare_parameter_is_itself() -> None:
    gm = captured(lambda m, x: torch.mm(x, (m.w * m.v).t()))
    constants, found = Constants(gm), nodes(gm)
    assert torch.equal(constants.value(found["t"]), (gm.w * gm.v).t())
    assert constants.value(found["w"]).data_ptr() == gm.w.data_ptr()
    assert not constants.value(found["t"]).requires_grad


def test_random_numbers_and_writes_are_never_constant() -> None:
    gm = captured(lambda m, x: x + torch.rand_like(m.w) + torch.clone(m.w).mul_(2) + torch.ones(4))
    constants = Constants(gm)
    by_name = nodes(gm)
    assert by_name["rand_like"] not in constants
    assert not is_pure(by_name["rand_like"])
    assert by_name["clone"] in constants
    graph = fx.Graph()
    write = graph.call_function(torch.ops.aten.mul_.Tensor, (graph.get_attr("w"), 2))
    assert not is_pure(write)
    assert write not in Constants(gm)


def test_an_operation_without_inputs_is_not_an_expression_over_parameters() -> None:
    gm = captured(lambda m, x: x + torch.arange(4))
    assert nodes(gm)["arange"] not in Constants(gm)


def test_an_expression_names_what_it_reads_once_and_holds_no_graph() -> None:
    gm = captured(lambda m, x: torch.mm(x, torch.cat([m.w * m.v, m.w * m.v + m.v[None]]).t()))
    names, compute = expression(nodes(gm)["t"])
    assert names == ("w", "v")
    w, v = torch.randn(4, 4), torch.randn(4)
    assert torch.equal(compute(w, v), torch.cat([w * v, w * v + v]).t())
    alive = weakref.ref(gm)
    del gm
    gc.collect()
    assert alive() is None
    assert compute(w, v).shape == (4, 8)


def test_an_expression_of_several_results() -> None:
    gm = captured(lambda m, x: x + torch.aminmax(m.w)[0] + m.w.split(2)[1].sum())
    constants, found = Constants(gm), nodes(gm)
    assert torch.equal(constants.value(found["getitem"]), gm.w.min())
    assert torch.equal(constants.value(found["sum_1"]), gm.w[2:].sum())


@pytest.mark.parametrize("length", [20_000])
def test_long_chains_do_not_recurse(length: int) -> None:
    root, graph = nn.Module(), fx.Graph()
    root.w = nn.Parameter(torch.ones(2))
    node = graph.get_attr("w")
    for _ in range(length):
        node = graph.call_function(torch.ops.aten.neg.default, (node,))
    graph.output(node)
    assert node in Constants(fx.GraphModule(root, graph))


def test_each_node_is_looked_at_once() -> None:
    """A ladder, where every rung reads the last one twice: 2**60 paths lead from the end to the parameter."""
    root, graph = nn.Module(), fx.Graph()
    root.w = nn.Parameter(torch.zeros(2))
    node = graph.get_attr("w")
    for _ in range(60):
        node = graph.call_function(torch.ops.aten.add.Tensor, (node, node))
    graph.output(node)
    gm = fx.GraphModule(root, graph)
    assert node in Constants(gm)
    assert torch.equal(Constants(gm).value(node), torch.zeros(2))


def test_how_a_constant_was_derived_is_remembered_in_order() -> None:
    gm = captured(lambda m, x: x + m.w)
    assert derived_constants(gm) == {}

    def double(w: Tensor) -> Tensor:
        return 2 * w

    derived_constants(gm)["twice"] = Derived(("w",), double)
    derived_constants(gm)["again"] = Derived(("twice",), double)
    assert list(derived_constants(gm)) == ["twice", "again"]
    assert torch.equal(derived_constants(gm)["twice"].compute(gm.w), 2 * gm.w)
