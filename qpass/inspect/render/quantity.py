"""Bytes as people read them."""

from __future__ import annotations


def quantity(count: int) -> str:
    """``"1.20 MB"``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} bytes"
