"""The pairs of nodes found so far between two graphs, and the ways to find more by what nodes have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable

from qpass.inspect.values.nodes import NodeView, Snapshot


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
        groups = [grouped(self.open(side), key) for side in (0, 1)]
        for value, lefts in groups[0].items():
            rights = groups[1].get(value, ())
            if len(lefts) == len(rights) and not (alone and len(lefts) > 1):
                for left, right in zip(lefts, rights, strict=True):
                    self.add(left, right)

    def in_order(self, key: Callable[[NodeView], Hashable | None]) -> None:
        """Pair open nodes of equal keys in order, as far as the shorter side reaches."""
        groups = [grouped(self.open(side), key) for side in (0, 1)]
        for value, lefts in groups[0].items():
            for left, right in zip(lefts, groups[1].get(value, ()), strict=False):
                self.add(left, right)

    def by_color(self, *sides: tuple[list[int], list[int]]) -> None:
        """Pair open operations whose colours are all equal, where both graphs have equally many of them."""

        def key(view: NodeView) -> Hashable | None:
            side = 0 if self.is_left(view) else 1
            return tuple(colors[side][view.index] for colors in sides) if is_operation(view) else None

        self.by_key(key)

    def is_left(self, view: NodeView) -> bool:
        """Whether a view is one of ``a``."""
        return view.index < len(self.a) and self.a.nodes[view.index] is view


def readers(graph: Snapshot, index: int) -> Iterable[tuple[int, int]]:
    """The operations that read a node, through whatever only carries its value."""
    for user, position in graph.users[index]:
        if graph.nodes[user].is_transparent:
            yield from readers(graph, user)
        else:
            yield user, position


def is_operation(view: NodeView) -> bool:
    """Whether a node computes something, an observer or q/dq included."""
    return view.op not in ("placeholder", "output", "get_attr")


def grouped(views: Iterable[NodeView], key: Callable[[NodeView], Hashable | None]) -> dict[Hashable, list[int]]:
    """Indices by key, in order; those whose key is None are left out."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for view in views:
        value = key(view)
        if value is not None:
            groups[value].append(view.index)
    return groups
