"""What a DDP hook or `compress_fsdp` has sent: one row for every bucket or unit, with bytes and the reason if plain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qpass.comm.training.ddp_hooks import DDPHook
from qpass.comm.training.fsdp import FSDPCompression
from qpass.comm.training.ledger import Entry
from qpass.errors import StrictError
from qpass.inspect.render import page
from qpass.inspect.render.report_text import table

Sender = DDPHook | FSDPCompression
SENDERS = (DDPHook, FSDPCompression)


@dataclass(frozen=True)
class SentReport:
    """What one rank has sent, and why what is plain is plain. ``str(report)`` is its text.

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

    def __str__(self) -> str:
        title, *figures = _headline(self)
        lines = [title, *(f"  {name:<10}{said}" for name, said in figures)]
        return "\n".join(lines + (["", *table(HEADER, _lines(self.rows))] if self.rows else []))

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        title, *figures = _headline(self)
        parts = [page.tag("p", page.tag("b", page.escape(title))), page.pairs(figures)]
        parts += [page.table(HEADER, _lines(self.rows), numbers=range(2, 5))] if self.rows else []
        return {"text/plain": str(self), "text/html": page.block(*parts)}


HEADER = ["place", "collective", "calls", "plain bytes", "bytes", "sent as", "reason"]


def sent_report(sender: Sender, strict: bool = False) -> SentReport:
    """The report of a DDP hook, or of the value of `compress_fsdp`, on this rank.

    Raises:
        StrictError: ``strict`` and something went plain for another reason than the caller's options.
    """
    title = f"DDP hook, {sender.codec}" if isinstance(sender, DDPHook) else "compress_fsdp"
    found = SentReport(title, sender.entries)
    if strict and found.missed:
        raise StrictError(
            f"{len(found.missed)} collectives went plain though they were to be compressed",
            where="\n         ".join(f"{row.place} ({row.collective}): {row.reason}" for row in found.missed),
            hint="mend what the reasons say, or ask for the report without strict=True",
        )
    return found


def _headline(report: SentReport) -> tuple[str, tuple[str, str], tuple[str, str]]:
    fewer = f", {report.plain_bytes / report.bytes:.2f} times fewer" if report.bytes else ""
    sent = f"{report.bytes} of this rank instead of {report.plain_bytes}{fewer}"
    coded = sum(bool(row.sent_as) for row in report.rows)
    rows = f"{coded} of {len(report.rows)} compressed" if report.rows else "nothing was sent yet"
    return f"qpass report: {report.title}", ("bytes", sent), ("rows", rows)


def _lines(rows: Sequence[Entry]) -> list[list[str]]:
    return [
        [row.place, row.collective, str(row.calls), str(row.plain_bytes), str(row.bytes), row.sent_as or "plain",
         row.reason]
        for row in rows
    ]  # fmt: skip
