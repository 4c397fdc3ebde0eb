"""ASCII text, so that names in a model cannot break what is printed."""

from __future__ import annotations


def ascii_only(piece: str) -> str:
    """``piece`` with control characters and what is not ASCII escaped, so that no name can move a cursor."""
    return "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in piece)
