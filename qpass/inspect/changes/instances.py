"""The changed nodes between two graphs, and which of them belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from qpass.inspect.changes.change import Change, Instance
from qpass.inspect.changes.expression import expressions
from qpass.inspect.matching.absorbed import absorbed
from qpass.inspect.values.nodes import NodeView, Snapshot


def changes(before: Snapshot, after: Snapshot, pairs: Mapping[int, int]) -> Iterator[Change]:
    """Every node that was removed, added, rewired or retargeted: removed ones first, each in the order of its graph."""
    left = {right: index for index, right in pairs.items()}
    yield from (Change("removed", view, None) for view in before.nodes if view.index not in pairs)
    for view in after.nodes:
        if view.index not in left:
            yield Change("added", None, view)
            continue
        old = before.nodes[left[view.index]]
        if old.operator != view.operator:
            yield Change("retargeted", old, view)
        elif tuple(pairs.get(source, -1) for source in old.inputs) != view.inputs or old.template != view.template:
            yield Change("rewired", old, view)


def instances(before: Snapshot, after: Snapshot, pairs: Mapping[int, int]) -> list[Instance]:
    """The changes in groups, in the order of the graph."""
    found = list(changes(before, after, pairs))
    groups = _Groups(before, after, pairs, found)
    result = []
    for members in groups.collected():
        center = _center(members)
        old, new = expressions(before, after, pairs, members)
        result.append(Instance(center, tuple(members), old, new))
    ahead = _next_paired(before, pairs)

    def position(instance: Instance) -> tuple[int, int]:
        view = instance.center.node
        return (view.index if instance.center.after else ahead[view.index], view.index)

    return sorted(result, key=position)


class _Groups:
    """Changes that belong together."""

    def __init__(self, before: Snapshot, after: Snapshot, pairs: Mapping[int, int], found: list[Change]) -> None:
        self.before, self.after, self.pairs, self.found = before, after, pairs, found
        self._left = {right: left for left, right in pairs.items()}
        self.old = {change.before.index: at for at, change in enumerate(found) if change.before}
        self.new = {change.after.index: at for at, change in enumerate(found) if change.after}
        self._parent = list(range(len(found)))
        joined = set()
        for at, change in enumerate(found):
            other = self._belongs_to(change)
            if other is not None and other != at:
                joined |= {at, other}
                self._join(at, other)
        for at, change in enumerate(found):  # a node that only reads another node than before belongs to what it reads
            if at not in joined and change.kind == "rewired" and change.after:
                read = [self.new[source] for source in change.after.inputs if source in self.new]
                if read:
                    self._join(at, read[0])

    def collected(self) -> list[list[Change]]:
        """The groups, each in the order of its changes."""
        groups: dict[int, list[Change]] = defaultdict(list)
        for at, change in enumerate(self.found):
            groups[self._find(at)].append(change)
        return list(groups.values())

    def _belongs_to(self, change: Change) -> int | None:
        """The change that a removed or added node is part of: that of what it went into, else of its first reader."""
        if change.kind == "removed":
            assert change.before is not None
            heir = (
                None if change.before.op == "get_attr" else absorbed(self.before, self.after, self.pairs, change.before)
            )
            if heir is not None and heir in self.new:
                return self.new[heir]
            return self._reader(self.before, change.before, self.old)
        if change.kind == "added":
            assert change.after is not None
            return self._reader(self.after, change.after, self.new)
        return None

    def _reader(self, graph: Snapshot, view: NodeView, table: Mapping[int, int]) -> int | None:
        readers = [table[user] for user, _ in graph.users[view.index] if user in table]
        return readers[0] if readers else None

    def _find(self, at: int) -> int:
        while self._parent[at] != at:
            self._parent[at] = self._parent[self._parent[at]]
            at = self._parent[at]
        return at

    def _join(self, one: int, other: int) -> None:
        self._parent[self._find(one)] = self._find(other)


def _center(members: Sequence[Change]) -> Change:
    def rank(change: Change) -> int:
        operation = not change.node.is_transparent and change.node.op not in ("get_attr", "placeholder")
        return ("retargeted", "rewired", "added", "removed").index(change.kind) + 4 * (not operation)

    best = min(map(rank, members))
    fitting = [change for change in members if rank(change) == best]
    return fitting[0] if fitting[0].kind in ("rewired", "retargeted") else fitting[-1]


def _next_paired(before: Snapshot, pairs: Mapping[int, int]) -> list[int]:
    """For each node of ``before``, the place in the other graph of the next node that is still there."""
    ahead, found = len(pairs) + len(before), [0] * len(before)
    for view in reversed(before.nodes):
        ahead = pairs.get(view.index, ahead)
        found[view.index] = ahead
    return found
