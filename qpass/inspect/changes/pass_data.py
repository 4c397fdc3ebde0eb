"""What is recorded of one pass over one graph."""

from __future__ import annotations

from dataclasses import dataclass

from qpass.inspect.changes.diff_data import DiffData


@dataclass(frozen=True)
class PassData:
    """One pass over one graph.

    Attributes:
        name: the pass; ``stage``: what its pipeline makes, ``""`` for a pass from outside qpass.
        changes: how many changes the pass says it made, None where it does not say.
        seconds: its time, without the recording.
        diff: what it changed.
        notes: what the pass noted, and what it refused with the reason.
    """

    name: str
    stage: str
    changes: int | None
    seconds: float
    diff: DiffData
    notes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether the graph is another one than before; a pass that only notes decisions changes none."""
        return bool(self.diff)
