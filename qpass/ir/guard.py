"""Assertions that the inputs of a call are inputs that the graph holds for.

A trace fixes whatever was static: sizes, dtypes, Python values. Given other inputs, the graph may compute a wrong
result silently. So the assumptions stand at its start as ATen assertions. They stay there through every copy,
compilation and export.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

HOLDS = "the graph holds for that"

_CHECKS = (
    aten.sym_size.int, operator.eq, operator.ne, operator.ge, operator.le, aten._assert_scalar.default,
    aten._assert_tensor_metadata.default,
)  # fmt: skip


def guard_inputs(gm: fx.GraphModule, ranges: Mapping[Any, Any], excluded: Collection[tuple[Any, int]] = ()) -> int:
    """Assert the dtypes, static sizes, bounds of dynamic sizes and Python values that ``gm`` was traced for.

    Args:
        gm: a graph whose placeholders have their values in ``meta["val"]``.
        ranges: the bounds of each symbol, as ``ExportedProgram.range_constraints`` has them. A lower bound of at most
            2 is ignored: torch writes it for every dynamic size.
        excluded: ``(symbol, size)`` pairs that the graph does not hold for.

    Returns the number of assertions. Inputs that nothing reads are not checked; Python values always are.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    if not placeholders:
        return 0
    head = _Head(gm.graph, placeholders[-1])
    bounded: set[Any] = set()
    for node in placeholders:
        val = node.meta.get("val")
        if isinstance(val, torch.Tensor):
            if node.users:
                head.check_sizes(node, val)
                head.check_dtype(node, val)
                for dim, size in enumerate(val.shape):
                    symbol = symbol_of(size)
                    if symbol is not None and symbol not in bounded:
                        bounded.add(symbol)
                        head.check_bounds(node, dim, ranges.get(symbol), [n for s, n in excluded if s == symbol])
        elif isinstance(val, (int, float, bool, str)) or ("val" in node.meta and val is None):
            equal = head.call(operator.eq, (node,), (val,), val=True)
            head.check(equal, f"input {node.name!r} was {val!r} when the model was captured, and the graph holds that")
    return head.count


def behind_checks(graph: fx.Graph) -> fx.Node:
    """The first node behind the inputs and the checks of them."""
    inputs = graph.find_nodes(op="placeholder")
    node = inputs[-1].next if inputs else next(iter(graph.nodes))
    while node.op == "placeholder" or node.target in _CHECKS:
        node = node.next
    return node


def static_size(size: Any) -> int | None:
    """The number that a size is, or became while the model was traced; None for a dynamic size."""
    if isinstance(size, torch.SymInt):
        return int(size.node.expr) if size.node.expr.is_Integer else None
    return int(size)


def symbol_of(size: Any) -> Any:
    """The symbol of a dynamic size; None for a static size and for an expression of symbols."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return expression if expression is not None and expression.is_Symbol else None


class _Head:
    """Inserts nodes in order behind the last placeholder."""

    def __init__(self, graph: fx.Graph, last: fx.Node) -> None:
        self.graph = graph
        self.last = last
        self.count = 0

    def call(self, target: Callable[..., Any], *args: Any, val: Any) -> fx.Node:
        with self.graph.inserting_after(self.last):
            self.last = self.graph.call_function(target, args)
        self.last.meta["val"] = val
        return self.last

    def check(self, condition: fx.Node, message: str) -> None:
        self.call(aten._assert_scalar.default, condition, message, val=None)
        self.count += 1

    def check_sizes(self, node: fx.Node, val: torch.Tensor) -> None:
        static = {dim: size for dim, size in enumerate(map(static_size, val.shape)) if size is not None}
        if not static:
            return
        sizes = tuple(self.call(aten.sym_size.int, node, dim, val=size) for dim, size in static.items())
        expected = ", ".join(str(static.get(dim, "any")) for dim in range(val.dim()))
        equal = self.call(operator.eq, sizes, tuple(static.values()), val=True)
        self.check(
            equal,
            f"input {node.name!r} must have the sizes [{expected}] that the model was captured for: "
            "dynamic_shapes of prepare allow others",
        )

    def check_dtype(self, node: fx.Node, val: torch.Tensor) -> None:
        self.call(aten._assert_tensor_metadata.default, node, None, None, val.dtype, val=None)
        self.count += 1

    def check_bounds(self, node: fx.Node, dim: int, bounds: Any, excluded: list[int]) -> None:
        wanted: list[tuple[Callable[..., Any], int, str]] = [(operator.ne, size, "other than") for size in excluded]
        if bounds is not None and bounds.lower.is_Integer and int(bounds.lower) > 2:
            wanted.append((operator.ge, int(bounds.lower), "at least"))
        if bounds is not None and bounds.upper.is_Integer:
            wanted.append((operator.le, int(bounds.upper), "at most"))
        if not wanted:
            return
        size = self.call(aten.sym_size.int, node, dim, val=node.meta["val"].shape[dim])
        for compare, bound, words in wanted:
            holds = self.call(compare, size, bound, val=True)
            self.check(holds, f"dimension {dim} of input {node.name!r} must be {words} {bound}: {HOLDS}")
