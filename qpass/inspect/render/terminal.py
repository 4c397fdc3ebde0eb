"""Printing in colour on a terminal."""

from __future__ import annotations

import os
import sys
from typing import IO, Any


def show(value: Any, file: IO[str] | None = None) -> None:
    """Print ``value``: its ``__rich__`` form on a terminal with rich installed and NO_COLOR unset, else its ``str``."""
    out = sys.stdout if file is None else file
    if out.isatty() and not os.environ.get("NO_COLOR"):
        try:
            from rich.console import Console
        except ImportError:
            pass
        else:
            Console(file=out).print(value, soft_wrap=True)
            return
    print(value, file=out)
