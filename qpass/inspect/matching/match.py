"""Which node of one graph is which of another: nodes that compute the same value are a pair.

In order, each step only on what the steps before left open:

1. constants of one name, form and region; inputs and outputs;
2. what the passes recorded: a node that a copy kept under its name, or that ``from_node`` derives from one of the other
   graph. It holds where both graphs descend from one; a node that the record explains as new is new;
   Operators with equal arguments on paired inputs compute one value, too;
3. for the rest, and for graphs of different exports: Merkle hashes of what a node reads and of what reads it, with and
   without names and modules, looking through observers and q/dq;
4. the longest common subsequence of operators inside a module, then of what is left of the whole graph;
5. nodes of different operators that hand their values to the same readers: retargeted.

The result does not depend on which graph comes first. Time grows with n log n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

from qpass.inspect.matching.lineage import recorded, related
from qpass.inspect.matching.merkle import Coloring, Colors
from qpass.inspect.matching.pairs import Pairs, grouped, is_operation, readers
from qpass.inspect.matching.subsequence import common_subsequence
from qpass.inspect.values.nodes import NodeView, Snapshot


def match(a: Snapshot, b: Snapshot) -> dict[int, int]:
    """Pairs of indices, ``a`` to ``b``; one to one."""
    if _order(b) < _order(a):
        return {left: right for right, left in match(b, a).items()}
    found = Pairs(a, b)
    found.by_key(lambda view: (view.region, view.operator, view.form) if view.op == "get_attr" else None)
    found.by_key(lambda view: (view.region, view.op) if view.op == "output" else None)
    found.by_key(lambda view: (view.region, view.name) if view.op == "placeholder" else None)
    found.in_order(lambda view: view.region if view.op == "placeholder" else None)
    descended = related(a, b)
    if descended:
        recorded(found)
        _congruent(found)
    if found.is_open:
        structural(found, descended)
    return found.right


def _congruent(found: Pairs) -> None:
    """Nodes of one operator with the same arguments, whose inputs are pairs: they compute one value, whatever else."""
    there = {
        (view.region, view.operator, view.template, view.inputs): view.index
        for view in found.b.nodes
        if view.index not in found.left and view.inputs
    }
    for view in found.a.nodes if there else ():
        if view.index not in found.right:
            inputs = tuple(found.right.get(source, -1) for source in view.inputs)
            other = there.get((view.region, view.operator, view.template, inputs))
            if other is not None:
                found.add(view.index, other)


def structural(found: Pairs, descended: bool) -> None:
    """Pairs by what nodes read and are read by."""
    for named in (True, False):
        both = Colors(found.a, found.b, found.right)
        base = both.bases(named)
        above, below = both.up(base), both.down(base)
        for colors in ((above, below), (above,), (below,)):
            found.by_color(*colors)
        _carriers(found)
        if not found.is_open:
            return
        for radius, literals in ((2, True), (0, True), (0, False)):
            place = (lambda view: view.module) if named else (lambda _: "")
            _subsequences(found, place, both.bases(named, literals), radius)
            _congruent(found)
        if not descended:
            _renamed_constants(found)
        _carriers(found)
    _same_readers(found)


def _subsequences(found: Pairs, place: Callable[[NodeView], str], base: Coloring, radius: int) -> None:
    """In each place, the longest common subsequence of operations; what is paired already anchors it."""
    open_places = {place(view) for view in found.open(0)} & {place(view) for view in found.open(1)}
    keys = Colors(found.a, found.b, found.right).nearby(base, radius)
    lines: list[dict[str, list[int]]] = []
    for graph in (found.a, found.b):
        line = grouped(filter(is_operation, graph.nodes), lambda v: p if (p := place(v)) in open_places else None)
        lines.append(line)  # type: ignore[arg-type]
    shut = found.explained
    for where, left in lines[0].items():
        right = lines[1].get(where, [])
        pairs = common_subsequence([keys[0][i] for i in left], [keys[1][i] for i in right])
        for one, other in pairs:
            if left[one] not in shut[0] and right[other] not in shut[1]:
                found.add(left[one], right[other])


def _carriers(found: Pairs) -> None:
    """Observers and q/dq of one kind that carry the same value, first those that hand it to the same operation."""

    def key(readers: bool) -> Callable[[NodeView], Hashable | None]:
        def of(view: NodeView) -> Hashable | None:
            if not view.is_transparent or not view.inputs:
                return None
            graph, translate = (found.a, found.right) if found.is_left(view) else (found.b, None)
            source = graph.sources[view.index]
            carried = source if translate is None else translate.get(source)
            if carried is None:
                return None
            if not readers:
                return carried, view.operator
            users = ((u, p) if translate is None else (translate.get(u), p) for u, p in graph.users[view.index])
            return carried, view.operator, tuple(sorted(pair for pair in users if pair[0] is not None))

        return of

    found.by_key(key(readers=True))
    found.by_key(key(readers=False))


def _renamed_constants(found: Pairs) -> None:
    """Constants of one form that stand at the same place in a pair of operations."""
    for left, right in list(found.right.items()):
        one, other = found.a.nodes[left], found.b.nodes[right]
        if one.operator != other.operator or len(one.inputs) != len(other.inputs):
            continue
        for i, j in zip(one.inputs, other.inputs, strict=True):
            x, y = found.a.nodes[found.a.sources[i]], found.b.nodes[found.b.sources[j]]
            if x.op == y.op == "get_attr" and x.form == y.form:
                found.add(x.index, y.index)


def _same_readers(found: Pairs) -> None:
    """Operations, whatever their operators, whose values the same operations read at the same places."""

    def key(view: NodeView) -> Hashable | None:
        if not is_operation(view) or view.is_transparent:
            return None
        here = found.is_left(view)
        graph = found.a if here else found.b
        reading = [
            (found.right.get(u) if here else u, p, graph.nodes[u].operator) for u, p in readers(graph, view.index)
        ]
        known = sorted((u, p, operator) for u, p, operator in reading if u is not None and u in found.left)
        return (view.module, tuple(known)) if known and len(known) == len(reading) else None

    found.by_key(key, alone=True)


def _order(graph: Snapshot) -> tuple[Any, ...]:
    """An order of snapshots by what they hold, so that a diff reads the same in both directions."""
    operators = Counter(view.operator for view in graph.nodes)
    return len(graph), sorted(operators.items()), [view.name for view in graph.nodes]
