"""A table as lines of text."""

from __future__ import annotations


def table(header: list[str], lines: list[list[str]]) -> list[str]:
    """Columns aligned left, the header underlined; numbers and dashes need nothing more, being short."""
    if not lines:
        return []
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [header, rule, *lines]]  # fmt: skip
