"""A recording as a table: which pass changed what, and how long it took."""

from __future__ import annotations

from collections.abc import Sequence

from qpass.inspect.changes.pass_data import PassData
from qpass.inspect.render import diff_html, page
from qpass.inspect.render.ascii import ascii_only
from qpass.inspect.render.table import table

HEADER = ("stage", "pass", "changed", "said", "+", "-", "~", "ms")


def text(passes: Sequence[PassData]) -> str:
    """The table in ASCII; numbers stand to the right."""
    rows = [row(found) for found in passes]
    total = sum(found.seconds for found in passes)
    changed = sum(found.changed for found in passes)
    lines = [list(HEADER), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    lines = [[*line[:3], *(cell.rjust(widths[3 + at]) for at, cell in enumerate(line[3:]))] for line in lines]
    title = f"qpass record: {len(passes)} passes, {changed} changed the graph, {1e3 * total:.1f} ms"
    return "\n".join([title, *(ascii_only(line) for line in table(lines[0], lines[1:]))])


def html(passes: Sequence[PassData]) -> str:
    """The table, and behind each pass its diff."""
    total = sum(found.seconds for found in passes)
    title = f" {len(passes)} passes, {1e3 * total:.1f} ms"
    parts = [page.tag("p", page.tag("b", "qpass record"), page.escape(title))]
    parts.append(page.table(HEADER, map(row, passes), numbers=range(3, len(HEADER))))
    for found in passes:
        if found.changed:
            name = f"{page.tag('b', page.escape(found.name))} {page.quiet(found.stage)}"
            parts.append(page.details(name, diff_html.html(found.diff)))
    return page.block(*parts)


def row(found: PassData) -> list[str]:
    """The cells of one pass."""
    diff = found.diff
    counts = (len(diff.added), len(diff.removed), len(diff.rewired) + len(diff.retargeted))
    said = "" if found.changes is None else str(found.changes)
    shown = [str(count) if count else "" for count in counts]
    return [found.stage, found.name, "yes" if found.changed else "", said, *shown, f"{1e3 * found.seconds:.1f}"]
