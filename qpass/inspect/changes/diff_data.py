"""What a diff holds: the changes between two graphs, to count, narrow and test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Self, TypeVar

from qpass.errors import InputError, near
from qpass.inspect.changes.change import Change, Edit, Instance
from qpass.inspect.changes.edits import edits
from qpass.inspect.values.nodes import NodeView, Snapshot

Pair = tuple[NodeView, NodeView]
CALLS = ("call_function", "call_module", "call_method")
KINDS = ("added", "removed", "rewired", "retargeted")
D = TypeVar("D")


@dataclass(frozen=True, repr=False, eq=False)
class DiffData:
    """What changed from one graph to another; true when anything did.

    It holds snapshots, not graphs: no weight stays alive by it. Narrower diffs come from :meth:`module`, :meth:`op` and
    :attr:`passes`; :attr:`edits` are the distinct edits.

    Attributes:
        before, after: what was compared.
        instances: the changes, gathered by place.
        matched: (before, after) of each node that both have, changed or not.
        metrics: name -> value for each node of ``after``, by its path.
        name: what made the difference, where that is known better than by stages or files.
    """

    before: Snapshot
    after: Snapshot
    instances: tuple[Instance, ...]
    matched: tuple[Pair, ...]
    metrics: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    name: str = ""

    def __bool__(self) -> bool:
        return bool(self.instances)

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """One entry for each changed node, in the order of the graphs: removed ones first."""
        found = [change for instance in self.instances for change in instance.changes]
        return tuple(sorted(found, key=lambda change: (change.kind != "removed", change.node.index)))

    @property
    def added(self) -> tuple[NodeView, ...]:
        """Nodes of ``after`` that ``before`` lacks."""
        return tuple(change.after for change in self.changes if change.kind == "added" and change.after)

    @property
    def removed(self) -> tuple[NodeView, ...]:
        """Nodes of ``before`` that ``after`` lacks."""
        return tuple(change.before for change in self.changes if change.kind == "removed" and change.before)

    @property
    def rewired(self) -> tuple[Pair, ...]:
        """Nodes that read other nodes than before, or have other literal arguments."""
        return self._both("rewired")

    @property
    def retargeted(self) -> tuple[Pair, ...]:
        """Nodes whose value another operator computes now."""
        return self._both("retargeted")

    @cached_property
    def edits(self) -> tuple[Edit, ...]:
        """The distinct edits, each with all places where it was made."""
        return tuple(edits(self.instances))

    @cached_property
    def ops(self) -> dict[str, tuple[int, int]]:
        """Operator -> (how many before, how many after), for those whose number changed, by name."""
        old = [*self.removed, *(before for before, _ in self.matched)]
        new = [*self.added, *(after for _, after in self.matched)]
        counts = [Counter(view.short for view in views if view.op in CALLS) for views in (old, new)]
        names = sorted(name for name in counts[0] | counts[1] if counts[0][name] != counts[1][name])
        return {name: (counts[0][name], counts[1][name]) for name in names}

    @cached_property
    def refusals(self) -> dict[tuple[str, str], tuple[NodeView, ...]]:
        """(operation, reason) -> the nodes of ``after`` for which the configuration asked for more than was done."""
        found: dict[tuple[str, str], list[NodeView]] = {}
        here = {id(view) for _, view in self.matched} | {id(view) for view in self.added}
        for view in self.after.nodes:
            if view.record is not None and view.record.is_missed and id(view) in here:
                found.setdefault((view.record.op, view.record.reason), []).append(view)
        return {key: tuple(views) for key, views in found.items()}

    # ---- narrower diffs

    def module(self, pattern: str) -> Self:
        """The part in modules whose path matches ``pattern`` (``"layers.0.*"``), sub-modules only where it says so."""
        return self._where(lambda view: fnmatchcase(view.module, pattern))

    def op(self, pattern: str) -> Self:
        """The instances that touch an operator: ``"linear"``, ``"aten.linear"``, ``"aten.*"``."""
        return self._where(lambda view: is_op(view, pattern))

    @property
    def passes(self) -> Mapping[str, Self]:
        """Pass name -> the instances in which that pass made a node."""
        names = dict.fromkeys(name for edit in self.edits for name in edit.passes)
        return _Passes({name: self._made_by(name) for name in names})

    def with_metric(self, name: str, values: Mapping[Any, float]) -> Self:
        """The same diff with a figure beside each node: ``diff.with_metric("sqnr", qpass.sqnr(a, b, x, nodes=True))``.

        Keys of ``values`` are nodes of ``after``, or their names (``"region/name"`` inside regions).
        """
        plain = {getattr(key, "path", None) or getattr(key, "name", None) or str(key): v for key, v in values.items()}
        return replace(self, metrics={**self.metrics, name: plain})

    # ---- in tests

    def assert_only(
        self, *, added: Sequence[str] = (), removed: Sequence[str] = (), retargeted: Sequence[str] = (),
        rewired: Sequence[str] | None = None,
    ) -> None:  # fmt: skip
        """Assert that just these operators changed; patterns as for :meth:`op`, ``"*"`` allows all.

        Nodes are added, removed or retargeted only by the patterns given, and each pattern must apply to some node, so
        that it cannot outlive what it allowed. ``rewired`` None allows any rewiring: additions bring it about.
        Constants count by their dotted name.

        Raises:
            AssertionError: something else changed, or a pattern applies to nothing.
        """
        faults = []
        for kind, patterns in (
            ("added", added),
            ("removed", removed),
            ("retargeted", retargeted),
            ("rewired", rewired),
        ):
            views = [change.node for change in self.changes if change.kind == kind]
            if patterns is None:
                continue
            wrong = [view for view in views if not any(is_op(view, pattern) for pattern in patterns)]
            faults += [f"{kind}: {view.path} ({view.operator})" for view in wrong]
            idle = [pattern for pattern in patterns if not any(is_op(view, pattern) for view in views)]
            faults += [f"nothing was {kind} that matches {pattern!r}" for pattern in idle]
        if faults:
            more = [f"... and {len(faults) - 20} more"] if len(faults) > 20 else []
            raise AssertionError("\n  ".join(["the graphs differ in other ways than allowed:", *faults[:20], *more]))

    def _both(self, kind: str) -> tuple[Pair, ...]:
        return tuple((c.before, c.after) for c in self.changes if c.kind == kind and c.before and c.after)

    def _where(self, holds: Callable[[NodeView], bool]) -> Self:
        def touched(instance: Instance) -> bool:
            views = (view for change in instance.changes for view in (change.before, change.after) if view)
            return any(map(holds, views))

        matched = tuple(pair for pair in self.matched if any(map(holds, pair)))
        return replace(self, instances=tuple(filter(touched, self.instances)), matched=matched)

    def _made_by(self, name: str) -> Self:
        chosen = {id(i) for edit in self.edits if name in edit.passes for i in edit.instances}
        return replace(self, instances=tuple(i for i in self.instances if id(i) in chosen))


class _Passes(dict[str, D]):
    def __missing__(self, name: str) -> D:
        raise InputError(
            f"no pass {name!r} made a node here{near(name, self)}", hint=f"known are {', '.join(self) or 'none'}"
        )


def is_op(view: NodeView, pattern: str) -> bool:
    """Whether a pattern names the operator of a node: in full, without overload, or in short."""
    names = {view.operator, view.operator.rpartition(".")[0], view.short, view.short.partition(".")[0]}
    return any(fnmatchcase(name, pattern) for name in names)
