"""The pages of `docs/` are true: names, formats and code that they show are those of qpass."""

from __future__ import annotations

import re
from pathlib import Path

import qpass
from qpass.inspect.saved import FORMAT

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text()


def test_the_stability_page_lists_the_public_names_and_the_format() -> None:
    text = page("stability.md")
    listed = text.partition("The names of `qpass` itself:")[2].partition(".\n")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted(qpass.__all__)
    assert f"It is **{FORMAT}**." in text
