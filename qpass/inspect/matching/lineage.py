"""Pairs that the passes recorded, between graphs that descend from one another or from one graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

from qpass.inspect.matching.pairs import Pairs, is_operation, readers
from qpass.inspect.values.nodes import NodeView, Origin, Snapshot, sizes


def recorded(found: Pairs) -> None:
    """Pairs between graphs that descend from one another, or from one graph."""
    _kept(found)
    _taken_over(found)
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
        if other is None or view.operator != other.operator or not _same_place(view, other):
            continue
        if view.origin is other.origin or view.origins() == other.origins():
            found.add(view.index, other.index)
    for left, right in list(found.right.items()):  # observers are numbered, and a number may be another's
        source = found.a.sources[left]
        if source != left and found.right.get(source, found.b.sources[right]) != found.b.sources[right]:
            del found.right[left], found.left[right]


def _same_place(one: NodeView, other: NodeView) -> bool:
    """Whether both come from one line of one module: the id of a graph that is gone may be another's by now."""
    return one.module == other.module and one.stack == other.stack


def _taken_over(found: Pairs) -> None:
    """Operations whose readers, all of them, now read one other operation of the same sizes: it took their place."""
    for view in reversed(found.a.nodes):
        if view.index in found.right or not is_operation(view) or view.is_transparent:
            continue
        heirs = set()
        for user, position in readers(found.a, view.index):
            reader = found.b.nodes[found.right[user]] if user in found.right else None
            same = reader is not None and reader.operator == found.a.nodes[user].operator
            known = same and position < len(reader.inputs)  # type: ignore[union-attr]
            heirs.add(found.b.sources[reader.inputs[position]] if known else -1)  # type: ignore[union-attr]
        heir = found.b.nodes[next(iter(heirs))] if len(heirs) == 1 and -1 not in heirs else None
        if heir is not None and is_operation(heir) and sizes(heir.val) == sizes(view.val):
            found.add(view.index, heir.index)


def _claims(old: Snapshot, new: Snapshot) -> dict[int, int]:
    """node of ``new`` -> the node of ``old`` that its history names, nearest ancestor first.

    A name means something only within its graph. An ancestor is a node of ``old`` when it was one of the very graph,
    when both descend from it, or, in a copy of the graph, when what lies behind it is just the history of the node.
    """
    views = [view for view in old.nodes if view.op not in ("placeholder", "output")]
    named = {(view.region, view.name): view for view in views}
    histories = {view.index: view.origins() for view in views}
    heirs: dict[tuple[int, str], NodeView] = {}
    for view in views:
        for origin in histories[view.index]:
            if origin.target == str(view.target):
                heirs.setdefault((origin.graph, origin.name), view)

    def ancestor(view: NodeView, history: tuple[Origin, ...]) -> NodeView | None:
        for position, origin in enumerate(history):
            own = named.get((view.region, origin.name))
            if own is None or not (origin.graph in old.graph_ids or histories[own.index] == history[position + 1 :]):
                own = heirs.get((origin.graph, origin.name))
            if own is not None and str(own.target) == origin.target and _same_place(own, view):
                return own
        return None

    claims = {view.index: ancestor(view, view.origins()) for view in new.nodes if view.origin}
    return {index: own.index for index, own in claims.items() if own is not None}


def _settle(
    claims: dict[int, int], old: Snapshot, new: Snapshot, paired: dict[int, int], explained: set[int],
    add: Callable[[int, int], None],
) -> None:  # fmt: skip
    """Of all nodes made from one node, the one that took its place is its pair; the others are new."""
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
    able = [view for view in made if is_operation(view) and not view.is_transparent]
    fitting = [view for view in able if sizes(view.val) == sizes(old.val)]
    carrying = [view for view in fitting if view.record is not None and old.record is not None]
    best = carrying or fitting
    return best[-1] if best else None


def related(a: Snapshot, b: Snapshot) -> bool:
    """Whether one graph descends from the other, or both from one: they share fake values, or say so."""
    there = {(view.region, view.name): view for view in b.nodes}
    for view in a.nodes:
        other = there.get((view.region, view.name))
        if other is not None and view.val is not None and view.val is other.val:
            return True
    behind = [{origin.graph for view in graph.nodes for origin in view.origins()} | graph.graph_ids for graph in (a, b)]
    return not behind[0].isdisjoint(behind[1])
