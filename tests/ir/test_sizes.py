"""Sizes that are numbers or nodes: one arithmetic for both."""

from __future__ import annotations

import torch

from lockstep import traced, value
from qpass.ir.editor import Editor
from qpass.ir.sizes import argument, is_data_dependent, is_known, is_symbolic, product, sizes, total, value_of


def test_what_is_known_makes_no_nodes() -> None:
    gm = traced(lambda x: x * 2, value(0, 4, 6))
    (x,), (node,) = gm.graph.find_nodes(op="placeholder"), gm.graph.find_nodes(op="call_function", target=MUL)
    before = len(gm.graph.nodes)
    rows, columns = sizes(Editor(gm), x, like=node, before=node)
    assert (rows, columns, product((rows, columns)), total((rows, columns))) == (4, 6, 24, 10)
    assert len(gm.graph.nodes) == before


def test_what_is_symbolic_is_computed_in_the_graph() -> None:
    gm = traced(lambda x: x * 2, value(0, 4, 6), dynamic=True)
    (x,), (node,) = gm.graph.find_nodes(op="placeholder"), gm.graph.find_nodes(op="call_function", target=MUL)
    rows, columns = sizes(Editor(gm), x, like=node, before=node)
    wanted = (product((3, rows, columns)) - total((rows, 5, 1))) // 4 + 0  # type: ignore[operator]
    gm.graph.output_node().args = (argument(wanted),)
    gm.graph.lint()
    gm.recompile()
    for shape in ((4, 6), (5, 9)):
        assert gm(torch.ones(shape)) == (3 * shape[0] * shape[1] - shape[0] - 6) // 4
    assert is_symbolic(value_of(wanted))
    assert not is_data_dependent(value_of(wanted))
    guards = len(x.meta["val"].fake_mode.shape_env.guards)
    assert is_known(value_of(rows * 4) % 2 == 0)
    assert not is_known(value_of(rows) % 2 == 0)  # true of 4, and not of all sizes
    assert len(x.meta["val"].fake_mode.shape_env.guards) == guards


def test_sizes_that_the_graph_states_are_not_asked_again() -> None:
    gm = traced(lambda x: x.view(x.shape[0] * 2, -1) * 2, value(0, 4, 6), dynamic=True)
    (view,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    (node,) = gm.graph.find_nodes(op="call_function", target=MUL)
    rows, _ = sizes(Editor(gm), view, view.args[1], like=node, before=node)
    assert argument(rows) is view.args[1][0]


MUL = torch.ops.aten.mul.Tensor
