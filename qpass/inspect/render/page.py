"""HTML that is inert wherever it is shown: no script, no style sheet, no id, no event attribute, nothing to load.

It survives an untrusted notebook and GitHub's viewer: structure by tables and ``details``, emphasis by a few ``style``
attributes that may be dropped without loss, pictures as data-URI images. All text passes through :func:`escape`.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence

MONO = "font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px"
QUIET = "color:#6e7781"
_WIDE = "max-width:1100px;line-height:1.45;font-family:system-ui,-apple-system,Segoe UI,Helvetica,Arial,sans-serif"


def escape(text: str) -> str:
    """``text`` with all that HTML gives a meaning replaced, control characters written out."""
    visible = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return html.escape(visible, quote=True)


def escape_lines(text: str) -> str:
    """Several lines, each escaped; they stay lines where white space is kept."""
    return "\n".join(map(escape, text.split("\n")))


def tag(name: str, *inside: str, style: str = "") -> str:
    """An element around finished HTML."""
    return f"<{name}{_style(style)}>{''.join(inside)}</{name}>"


def quiet(text: str) -> str:
    """Text in grey."""
    return tag("small", escape(text), style=QUIET) if text else ""


def table(header: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of texts; ``numbers`` are the columns set to the right."""
    right = set(numbers)
    cell = "padding:2px 12px 2px 0;vertical-align:top;text-align:"
    places = [cell + ("right" if column in right else "left") for column in range(len(header))]
    head = tag("tr", *(tag("th", escape(text), style=place) for text, place in zip(header, places, strict=True)))
    body = (
        tag("tr", *(tag("td", escape(text), style=place) for text, place in zip(row, places, strict=True)))
        for row in rows
    )
    return tag("table", head, *body, style="border-collapse:collapse;font-size:13px")


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and what is said about them."""
    cell = "padding:1px 16px 1px 0;text-align:left;white-space:pre-wrap"
    lines = (tag("tr", tag("td", quiet(name), style=cell), tag("td", escape(text), style=cell)) for name, text in rows)
    return tag("table", *lines, style="border-collapse:collapse;font-size:13px")


def details(summary: str, *inside: str, opened: bool = False) -> str:
    """A part that opens on a click; ``summary`` and ``inside`` are finished HTML."""
    start = f'<details{" open" if opened else ""} style="margin:8px 0">'
    return f"{start}{tag('summary', summary)}{''.join(inside)}</details>"


def picture(svg: str, says: str) -> str:
    """An SVG as an image: what is inside can neither run nor load anything."""
    data = base64.b64encode(svg.encode()).decode()
    return f'<img alt="{escape(says)}" style="max-width:100%" src="data:image/svg+xml;base64,{data}">'


def block(*inside: str) -> str:
    """Finished HTML as one block of a notebook or a page."""
    return tag("div", *inside, style=_WIDE)


def page(title: str, body: str) -> str:
    """A whole document around ``body``."""
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title></head>\n'
        f"<body>{body}</body></html>\n"
    )


def _style(style: str) -> str:
    return f' style="{style}"' if style else ""
