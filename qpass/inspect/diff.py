"""``qpass.diff(a, b)``: what changed between two graphs, as a value to print, narrow, test and save."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qpass.inspect.changes.diff_data import KINDS, DiffData
from qpass.inspect.changes.instances import instances
from qpass.inspect.matching.match import match
from qpass.inspect.render import model_explorer
from qpass.inspect.render.diff_html import html
from qpass.inspect.render.diff_text import rich_text, text
from qpass.inspect.render.export import to_dot, to_json
from qpass.inspect.render.page import page
from qpass.inspect.render.terminal import show
from qpass.inspect.snapshot import snapshot


@dataclass(frozen=True, repr=False, eq=False)
class GraphDiff(DiffData):
    """What changed from one graph to another; true when anything did.

    :class:`DiffData` has its content. ``str(diff)`` is ASCII and stable over runs; :meth:`show` prints it in colour on
    a terminal; a notebook shows it as HTML.
    """

    def __str__(self) -> str:
        return text(self)

    def __repr__(self) -> str:
        counts = ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in KINDS)
        return f"<GraphDiff: {counts}; {len(self.edits)} distinct edits>"

    def __rich__(self) -> Any:
        return rich_text(self)

    def show(self, file: IO[str] | None = None) -> None:
        """Print it, in colour where ``file`` (standard output) is a terminal, rich is installed and NO_COLOR unset."""
        show(self, file)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": html(self)}

    def save_html(self, path: str | os.PathLike[str]) -> None:
        """Write it as one self-contained page: no script, nothing to load."""
        Path(path).write_text(page("qpass diff", html(self)), encoding="utf-8")

    def to_json(self) -> str:
        """All of it as JSON, keys sorted."""
        return to_json(self)

    def to_dot(self) -> str:
        """The changed nodes and their neighbours in Graphviz' language: a cluster for each distinct edit."""
        return to_dot(self)

    def to_model_explorer(self, folder: str | os.PathLike[str]) -> None:
        """Write both graphs, the node mapping and all metrics as files that Model Explorer opens, into ``folder``."""
        model_explorer.write(self, Path(folder))


def diff(a: Any, b: Any) -> GraphDiff:
    """What changed from ``a`` to ``b``.

    Args:
        a: a GraphModule, an ExportedProgram, the path of a saved one (``.pt2``), or a model compiled by qpass that ran.
        b: the same, of any stage, of the same export or another.

    Raises:
        InputError: one of them is none of these.
    """
    before, after = snapshot(a), snapshot(b)
    pairs = match(before, after)
    matched = tuple((before.nodes[left], after.nodes[right]) for left, right in sorted(pairs.items()))
    return GraphDiff(before, after, tuple(instances(before, after, pairs)), matched)
