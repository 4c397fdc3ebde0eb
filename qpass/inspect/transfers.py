"""The collectives of a compiled model as their decisions account for them: one row each, and all of them as a table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qpass.comm.graph.decisions import GraphDecisions


@dataclass(frozen=True)
class Transfer:
    """One collective of a compiled graph.

    ``direction`` is "forward" or "backward". ``sent_as`` names what goes instead, ``""`` where it is sent plain;
    ``reason`` then says why, and else the bytes before and after. ``missed``: the policy wanted it compressed.
    """

    collective: str
    direction: str
    module: str = ""
    line: str = ""
    group: str = ""
    sent_as: str = ""
    reason: str = ""
    missed: bool = False

    @property
    def place(self) -> str:
        """The module around it, or where none is known the user's line."""
        return self.module or self.line or "(unknown)"


def transfers(graphs: Iterable[GraphDecisions]) -> list[Transfer]:
    """The rows of compiled graphs, in their order."""
    return [
        Transfer(
            record.op, "backward" if decisions.backward else "forward", record.module, record.line, record.group,
            record.kernel if record.outcome == "lowered" else "", record.reason, record.is_missed,
        )
        for decisions in graphs for record in decisions.records
    ]  # fmt: skip


def per_transfer(rows: Sequence[Transfer]) -> list[list[str]]:
    """The rows of a table, its header first; what is told of several collectives at one place is one row."""
    counts = Counter((row.place, row.direction, row.collective, row.sent_as or "plain", row.reason) for row in rows)
    lines = [
        [place + (f" x{count}" if count > 1 else ""), direction, collective, sent_as, reason]
        for (place, direction, collective, sent_as, reason), count in counts.items()
    ]
    return [["place", "graph", "collective", "sent as", "bytes, or why not"], *lines] if lines else []
