"""What one rank has sent in training, by bucket or unit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from qpass.comm.training.ledger import Entry


@dataclass(frozen=True)
class SentData:
    """What one rank has sent, and why some of it was sent plain.

    Attributes:
        title: whose report it is.
        rows: for each bucket or unit and collective, how often and in how many bytes it went, and as what.
    """

    title: str
    rows: tuple[Entry, ...]

    @property
    def bytes(self) -> int:
        """Bytes that this rank sent."""
        return sum(row.bytes for row in self.rows)

    @property
    def plain_bytes(self) -> int:
        """Bytes that plain collectives send at best for the same."""
        return sum(row.plain_bytes for row in self.rows)

    @property
    def missed(self) -> tuple[Entry, ...]:
        """The rows that went plain though compression was asked for."""
        return tuple(row for row in self.rows if row.missed)

    def to_dict(self) -> dict[str, Any]:
        """The report in dicts, lists, strings and numbers, as JSON takes them."""
        counts = {"bytes": self.bytes, "plain_bytes": self.plain_bytes}
        return {"title": self.title, **counts, "rows": [asdict(row) for row in self.rows]}
