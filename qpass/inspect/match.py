"""Which node of one graph is which of another: nodes that compute the same value are a pair.

In order, each step only on what the steps before left open:

1. constants of one name, form and region; inputs and outputs;
2. what the passes recorded: a node that a copy kept under its name, or that ``from_node`` derives from one of the other
   graph. It holds where both graphs descend from one; a node that the record explains as new is new;
3. for the rest, and for graphs of different exports: Merkle hashes of what a node reads and of what reads it, with and
   without names and modules, looking through observers and q/dq;
4. the longest common subsequence of operators inside a module, then of what is left of the whole graph;
5. nodes of different operators that hand their values to the same readers: retargeted.

The result does not depend on which graph comes first. Time grows with n log n.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from qpass.inspect.merkle import Colors
from qpass.inspect.nodes import NodeView, Snapshot, graphs_behind, sizes
from qpass.inspect.subsequence import common_subsequence


def match(a: Snapshot, b: Snapshot) -> dict[int, int]:
    """Pairs of indices, ``a`` to ``b``; one to one."""
    if _order(b) < _order(a):
        return {left: right for right, left in match(b, a).items()}
    found = Pairs(a, b)
    found.by_key(lambda view: (view.region, view.operator, view.form) if view.op == "get_attr" else None)
    found.by_key(lambda view: (view.region, view.op) if view.op == "output" else None)
    related = _related(a, b)
    if related:
        recorded(found)
    found.by_key(lambda view: (view.region, view.name) if view.op == "placeholder" else None)
    found.in_order(lambda view: view.region if view.op == "placeholder" else None)
    if found.is_open:
        structural(found, related)
    return found.right


class Pairs:
    """The pairs found so far. ``explained``: nodes of either graph that the record explains as new."""

    def __init__(self, a: Snapshot, b: Snapshot) -> None:
        self.a, self.b = a, b
        self.right: dict[int, int] = {}
        self.left: dict[int, int] = {}
        self.explained: tuple[set[int], set[int]] = (set(), set())

    def add(self, left: int, right: int) -> None:
        if left not in self.right and right not in self.left:
            self.right[left] = right
            self.left[right] = left

    def open(self, side: int) -> list[NodeView]:
        """The nodes of one side that have no pair and may still get one."""
        graph, paired = (self.a, self.right) if side == 0 else (self.b, self.left)
        new = self.explained[side]
        return [view for view in graph.nodes if view.index not in paired and view.index not in new]

    @property
    def is_open(self) -> bool:
        """Whether both sides have nodes left."""
        return bool(self.open(0)) and bool(self.open(1))

    def by_key(self, key: Callable[[NodeView], Hashable | None], *, alone: bool = False) -> None:
        """Pair open nodes of equal keys where both sides have equally many (``alone``: just one), in order."""
        groups = [_grouped(self.open(side), key) for side in (0, 1)]
        for value, lefts in groups[0].items():
            rights = groups[1].get(value, ())
            if len(lefts) == len(rights) and not (alone and len(lefts) > 1):
                for left, right in zip(lefts, rights, strict=True):
                    self.add(left, right)

    def in_order(self, key: Callable[[NodeView], Hashable | None]) -> None:
        """Pair open nodes of equal keys in order, as far as the shorter side reaches."""
        groups = [_grouped(self.open(side), key) for side in (0, 1)]
        for value, lefts in groups[0].items():
            for left, right in zip(lefts, groups[1].get(value, ()), strict=False):
                self.add(left, right)

    def by_color(self, *sides: tuple[list[int], list[int]]) -> None:
        """Pair open operations whose colours are all equal, where both graphs have equally many of them."""

        def key(view: NodeView) -> Hashable | None:
            side = 0 if self.is_left(view) else 1
            return tuple(colors[side][view.index] for colors in sides) if _is_operation(view) else None

        self.by_key(key)

    def is_left(self, view: NodeView) -> bool:
        """Whether a view is one of ``a``."""
        return view.index < len(self.a) and self.a.nodes[view.index] is view


# ---- what the passes recorded


def recorded(found: Pairs) -> None:
    """Pairs between graphs that descend from one another, or from one graph."""
    _kept(found)
    ahead, back = _claims(found.a, found.b), _claims(found.b, found.a)
    if len(back) > len(ahead):
        _settle(back, found.b, found.a, found.left, found.explained[0], lambda old, new: found.add(new, old))
    else:
        _settle(ahead, found.a, found.b, found.right, found.explained[1], found.add)


def _kept(found: Pairs) -> None:
    """Nodes that were copied with the graph, or never touched: name, operator, module and history are the same."""
    there = {(view.region, view.name): view for view in found.b.nodes}
    for view in found.a.nodes:
        other = there.get((view.region, view.name))
        if other is None or view.operator != other.operator or view.module != other.module:
            continue
        if view.origin is other.origin or view.origins() == other.origins():
            found.add(view.index, other.index)
    for left, right in list(found.right.items()):  # observers are numbered, and a number may be another's
        source = found.a.sources[left]
        if source != left and found.right.get(source, found.b.sources[right]) != found.b.sources[right]:
            del found.right[left], found.left[right]


def _claims(old: Snapshot, new: Snapshot) -> dict[int, int]:
    """node of ``new`` -> the node of ``old`` that its history names, nearest ancestor first."""
    there = {(view.region, view.name): view for view in old.nodes if view.op not in ("placeholder", "output")}
    claims = {}
    for view in new.nodes:
        for name, target in view.origins():
            older = there.get((view.region, name))
            if older is not None and str(older.target) == target and older.module == view.module:
                claims[view.index] = older.index
                break
    return claims


def _settle(
    claims: dict[int, int], old: Snapshot, new: Snapshot, paired: dict[int, int], explained: set[int],
    add: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Of all that was made from one node, the one that took its place is its pair; the rest is new."""
    made: dict[int, list[NodeView]] = defaultdict(list)
    for index, source in claims.items():
        made[source].append(new.nodes[index])
    for source, views in made.items():
        if source not in paired:
            heir = _heir(old.nodes[source], views)
            if heir is not None:
                add(source, heir.index)
        explained.update(view.index for view in views)


def _heir(old: NodeView, made: Sequence[NodeView]) -> NodeView | None:
    same = [view for view in made if view.operator == old.operator]
    if same or old.is_transparent:
        return same[0] if same else None
    able = [view for view in made if _is_operation(view) and not view.is_transparent]
    fitting = [view for view in able if sizes(view.val) == sizes(old.val)]
    carrying = [view for view in fitting if view.record is not None and old.record is not None]
    best = carrying or fitting
    return best[-1] if best else None


def _related(a: Snapshot, b: Snapshot) -> bool:
    """Whether one graph descends from the other, or both from one: they share fake values, or say so."""
    there = {(view.region, view.name): view for view in b.nodes}
    for view in a.nodes:
        other = there.get((view.region, view.name))
        if other is not None and view.val is not None and view.val is other.val:
            return True
    return not (a.graph_ids | graphs_behind(a.nodes)).isdisjoint(b.graph_ids | graphs_behind(b.nodes))


# ---- what the structure says


def structural(found: Pairs, related: bool) -> None:
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
        for radius in (2, 0):
            _subsequences(found, (lambda view: view.module) if named else (lambda _: ""), radius, named)
        if not related:
            _renamed_constants(found)
        _carriers(found)
    _same_readers(found)


def _subsequences(found: Pairs, place: Callable[[NodeView], str], radius: int, named: bool) -> None:
    """In each place, the longest common subsequence of operations; what is paired already anchors it."""
    open_places = {place(view) for view in found.open(0)} & {place(view) for view in found.open(1)}
    both = Colors(found.a, found.b, found.right)
    keys = both.nearby(both.bases(named, literals=radius > 0), radius)
    lines: list[dict[str, list[int]]] = []
    for graph in (found.a, found.b):
        grouped = _grouped(filter(_is_operation, graph.nodes), lambda v: p if (p := place(v)) in open_places else None)
        lines.append(grouped)  # type: ignore[arg-type]
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
        if not _is_operation(view) or view.is_transparent:
            return None
        here = found.is_left(view)
        graph = found.a if here else found.b
        readers = [(found.right.get(u) if here else u, p) for u, p in _readers(graph, view.index)]
        known = sorted((u, p) for u, p in readers if u is not None and u in found.left)
        return (view.module, tuple(known)) if known and len(known) == len(readers) else None

    found.by_key(key, alone=True)


def _readers(graph: Snapshot, index: int) -> Iterable[tuple[int, int]]:
    """The operations that read a node, through whatever only carries its value."""
    for user, position in graph.users[index]:
        if graph.nodes[user].is_transparent:
            yield from _readers(graph, user)
        else:
            yield user, position


def _is_operation(view: NodeView) -> bool:
    return view.op not in ("placeholder", "output", "get_attr")


def _grouped(views: Iterable[NodeView], key: Callable[[NodeView], Hashable | None]) -> dict[Hashable, list[int]]:
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for view in views:
        value = key(view)
        if value is not None:
            groups[value].append(view.index)
    return groups


def _order(graph: Snapshot) -> tuple[Any, ...]:
    """An order of snapshots by what they hold, so that a diff reads the same in both directions."""
    operators = Counter(view.operator for view in graph.nodes)
    return len(graph), sorted(operators.items()), [view.name for view in graph.nodes]
