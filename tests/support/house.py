"""The files of the repository that are installed, by their dotted names."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def modules() -> dict[str, Path]:
    """Dotted name -> file, for every Python file that is installed."""
    found = {}
    for folder, package in ((ROOT / "qpass", "qpass"), (ROOT / "patterns", "qpass.patterns")):
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = file
    return found


MODULES = modules()
