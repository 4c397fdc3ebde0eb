"""Colours of nodes: equal where all that a node reads, or all that reads it, is equal. Compared exactly, not by hash.

A colour is the number of a distinct description, given out in order of appearance to both graphs alike (hash-consing),
so equal colours mean equal descriptions and no digest can collide. Nodes paired before have one colour of their own.
Observers and q/dq pass on the colour of the value that they carry.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from qpass.inspect.values.nodes import NodeView, Snapshot

Coloring = tuple[list[int], list[int]]


class Colors:
    """The colours of two graphs, given the pairs known so far (indices of ``a`` to indices of ``b``)."""

    def __init__(self, a: Snapshot, b: Snapshot, pairs: Mapping[int, int]) -> None:
        self.graphs = (a, b)
        self._known: dict[Hashable, int] = {}
        fixed = {left: self._color(("pair", left)) for left in pairs}
        self._fixed = (fixed, {right: fixed[left] for left, right in pairs.items()})

    def bases(self, named: bool, literals: bool = True) -> Coloring:
        """What a node is in itself: its operator, its literal arguments, and with ``named`` its module and region."""
        a, b = ([self._color(_base(view, named, literals)) for view in graph.nodes] for graph in self.graphs)
        return a, b

    def up(self, base: Coloring) -> Coloring:
        """Colours by all that a node reads, from the inputs of the graph on."""
        return self._up(0, base[0]), self._up(1, base[1])

    def down(self, base: Coloring) -> Coloring:
        """Colours by all that reads a node, as far as the outputs of the graph."""
        return self._down(0, base[0]), self._down(1, base[1])

    def nearby(self, base: Coloring, radius: int) -> Coloring:
        """Colours by what lies at most ``radius`` steps away."""
        found = []
        for graph, fixed, start in zip(self.graphs, self._fixed, base, strict=True):
            current = [fixed.get(index, color) for index, color in enumerate(start)]
            sources, users = graph.sources, graph.users
            for _ in range(radius):
                current = [
                    fixed.get(view.index) or self._color((
                        current[view.index], *[current[sources[i]] for i in view.inputs], -1,
                        *sorted([current[u] for u, _ in users[view.index] if not graph.nodes[u].is_transparent]),
                    ))
                    for view in graph.nodes
                ]  # fmt: skip
            found.append(current)
        return found[0], found[1]

    def _up(self, side: int, base: list[int]) -> list[int]:
        graph, fixed = self.graphs[side], self._fixed[side]
        found: list[int] = []
        seen: list[int] = []  # the colour under which readers see it
        for view in graph.nodes:
            color = fixed.get(view.index)
            if color is None:
                color = self._color((base[view.index], *[seen[i] for i in view.inputs]))
            found.append(color)
            seen.append(seen[view.inputs[0]] if view.is_transparent and view.inputs else color)
        return found

    def _down(self, side: int, base: list[int]) -> list[int]:
        graph, fixed = self.graphs[side], self._fixed[side]
        found = [0] * len(graph)
        readers: list[list[tuple[int, int]]] = [[] for _ in graph.nodes]
        for view in reversed(graph.nodes):
            index = view.index
            color = fixed.get(index)
            if color is None:
                color = self._color((base[index], tuple(sorted(readers[index]))))
            found[index] = color
            for position, source in enumerate(view.inputs):
                if view.is_transparent and position == 0:
                    readers[source] += readers[index]
                elif not view.is_transparent:
                    readers[source].append((color, position))
        return found

    def _color(self, description: Hashable) -> int:
        return self._known.setdefault(description, len(self._known) + 1)


def _base(view: NodeView, named: bool, literals: bool) -> tuple[Any, ...]:
    if view.op == "get_attr":  # the owner and not the leaf: a weight may be stored as codes beside it
        return ("get_attr", view.region, view.operator.rpartition(".")[0]) if named else ("get_attr", view.form)
    if view.op == "placeholder":
        return "placeholder", view.region, view.name if named else ""
    what = view.template if literals and not view.is_transparent else ()
    return (view.operator, what, view.module, view.region) if named else (view.operator, what)
