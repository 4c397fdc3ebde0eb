"""What was sent in training as a table: text and HTML."""

from __future__ import annotations

from collections.abc import Sequence

from qpass.comm.training.ledger import Entry
from qpass.inspect.render import page
from qpass.inspect.render.table import table
from qpass.inspect.values.sent_data import SentData

HEADER = ["place", "collective", "calls", "plain bytes", "bytes", "sent as", "reason"]


def text(report: SentData) -> str:
    """The headline and the table."""
    title, *figures = _headline(report)
    lines = [title, *(f"  {name:<10}{said}" for name, said in figures)]
    return "\n".join(lines + (["", *table(HEADER, _lines(report.rows))] if report.rows else []))


def html(report: SentData) -> str:
    """The same as HTML."""
    title, *figures = _headline(report)
    parts = [page.tag("p", page.tag("b", page.escape(title))), page.pairs(figures)]
    parts += [page.table(HEADER, _lines(report.rows), numbers=range(2, 5))] if report.rows else []
    return page.block(*parts)


def _headline(report: SentData) -> tuple[str, tuple[str, str], tuple[str, str]]:
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
