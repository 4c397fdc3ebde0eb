"""What changed between two graphs, gathered into edits that read like laws: ``before -> after``, once a kind of place.

A *change* is one node. An *instance* is the changes that belong together: one operation and the observers, q/dq and
constants in front of it, an operation and what was fused into it. An *edit* is all instances that read the same.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from qpass.inspect.expression import expressions
from qpass.inspect.matching.pairs import readers
from qpass.inspect.nodes import NodeView, Snapshot
from qpass.inspect.render.report_text import NUMBER, path_patterns

Kind = Literal["removed", "added", "rewired", "retargeted"]


class Change(NamedTuple):
    """One node that is not what it was. "rewired": it reads other nodes or has other literal arguments; "retargeted":
    another operator computes its value."""

    kind: Kind
    before: NodeView | None
    after: NodeView | None

    @property
    def node(self) -> NodeView:
        """The node as it is now, or as it was last."""
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def made_by(self) -> str:
        """The pass that made the node as it is now, ``""`` where it is the old one or nothing is recorded."""
        if self.after is None or (self.before is not None and self.before.origins() == self.after.origins()):
            return ""
        return self.after.made_by


@dataclass(frozen=True)
class Instance:
    """The changes at one place; ``center`` is the operation that they are about."""

    center: Change
    changes: tuple[Change, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def module(self) -> str:
        """The path of the user's module where it happened, with the region that holds it."""
        view = self.center.node
        record = view.record if self.center.kind == "retargeted" else None
        return (record.module if record else "") or view.module or view.region

    @property
    def signature(self) -> tuple[object, ...]:
        """What equal edits have in common, wherever they happened."""
        return self.before, self.after, tuple(sorted(change.kind for change in self.changes))


@dataclass(frozen=True)
class Edit:
    """Instances that read the same, at places whose paths differ in whole numbers only."""

    pattern: str
    instances: tuple[Instance, ...]

    @cached_property
    def text(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The expressions before and after, one for each result; ``x``, ``y`` ... are values from outside.

        Equal ones, as the steps of a loop leave them, are one with a count: ``"select(dq(q(x)))  x60"``.
        """
        return counted(self.instances[0].before), counted(self.instances[0].after)

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that made its new nodes, as far as recorded."""
        made = (change.made_by for change in self.instances[0].changes)
        return tuple(dict.fromkeys(filter(None, made)))


def counted(lines: Sequence[str]) -> tuple[str, ...]:
    """Each distinct line once, where it came first, with how often it is there."""
    return tuple(f"{line}  x{count}" if count > 1 else line for line, count in Counter(lines).items())


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


def edits(found: Sequence[Instance]) -> Iterator[Edit]:
    """Equal instances in one edit for each pattern of module paths, in order of appearance."""
    groups: dict[object, list[Instance]] = defaultdict(list)
    for instance in found:
        groups[NUMBER.sub("#", instance.module), instance.signature].append(instance)
    order = {id(instance): number for number, instance in enumerate(found)}
    parts = []
    for members in groups.values():
        by_path: dict[str, list[Instance]] = defaultdict(list)
        for instance in members:
            by_path[instance.module].append(instance)
        for pattern, paths in path_patterns(by_path):
            parts.append(Edit(pattern, tuple(instance for path in paths for instance in by_path[path])))
    yield from sorted(parts, key=lambda edit: order[id(edit.instances[0])])


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
        for at, change in enumerate(found):  # what merely reads another node now belongs to what it reads
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


def absorbed(before: Snapshot, after: Snapshot, pairs: Mapping[int, int], gone: NodeView) -> int | None:
    """The node of ``after`` that now computes the value of a removed operation and is another one's pair: what every
    reader of the removed one reads instead, through observers and q/dq. A batch norm folded into a convolution is
    absorbed by it."""
    found = set()
    if gone.op == "get_attr" or gone.is_transparent:
        return None
    for user, position in readers(before, gone.index):
        reader = after.nodes[pairs[user]] if user in pairs else None
        if reader is None or reader.operator != before.nodes[user].operator or position >= len(reader.inputs):
            return None
        found.add(after.sources[reader.inputs[position]])
    if len(found) != 1:
        return None
    heir = found.pop()
    reads = {pairs.get(before.sources[source]) for source in gone.inputs}
    return heir if heir in reads else None


def _center(members: Sequence[Change]) -> Change:
    def rank(change: Change) -> int:
        operation = not change.node.is_transparent and change.node.op not in ("get_attr", "placeholder")
        return ("retargeted", "rewired", "added", "removed").index(change.kind) + 4 * (not operation)

    best = min(map(rank, members))
    fitting = [change for change in members if rank(change) == best]
    return fitting[0] if fitting[0].kind in ("rewired", "retargeted") else fitting[-1]


def _next_paired(before: Snapshot, pairs: Mapping[int, int]) -> list[int]:
    """For each node of ``before``, where in the other graph the next node stands that is still there."""
    ahead, found = len(pairs) + len(before), [0] * len(before)
    for view in reversed(before.nodes):
        ahead = pairs.get(view.index, ahead)
        found[view.index] = ahead
    return found
