"""Observed ranges as a table with a small histogram in each line: text and HTML."""

from __future__ import annotations

from collections.abc import Sequence

from qpass.arithmetic.numerics import dtype_name
from qpass.inspect.render import page
from qpass.inspect.render.ascii import ascii_only
from qpass.inspect.render.table import table
from qpass.inspect.values.observed_range import ObservedRange

HEADER = ("observer", "module", "dtype", "lowest", "highest", "used")


def text(ranges: Sequence[ObservedRange]) -> str:
    """The table in ASCII."""
    lines = [[*_cells(found), _bars(found.counts)] for found in ranges]
    return "\n".join(ascii_only(line) for line in table([*HEADER, "values (log scale)"], lines))


def html(ranges: Sequence[ObservedRange]) -> str:
    """The table as HTML."""
    lines = [[*_cells(found), _bars(found.counts, " ▁▂▃▄▅▆▇█")] for found in ranges]
    return page.block(page.table([*HEADER, "values (log scale)"], lines, numbers=(3, 4, 5)))


def _cells(found: ObservedRange) -> list[str]:
    span = (found.high - found.low) or 1.0
    used = 100 * (found.chosen[1] - found.chosen[0]) / span
    dtype = dtype_name(found.dtype)
    return [found.name, found.module or "-", dtype, f"{found.low:.4g}", f"{found.high:.4g}", f"{min(used, 999):.0f} %"]


def _bars(counts: Sequence[int], signs: str = " .:-=+*#") -> str:
    """Counts as signs of rising weight, by their number of binary digits: tails are what one looks for."""
    most = max(counts, default=0).bit_length()
    return "".join(signs[-(-count.bit_length() * (len(signs) - 1) // most)] if most else " " for count in counts)
