"""A changed node, the changes at one place, and all places that changed alike.

A *change* is one node. An *instance* is the changes that belong together: one operation and the observers, q/dq and
constants in front of it, an operation and what was fused into it. An *edit* is all instances that read the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from qpass.inspect.values.nodes import NodeView

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
