"""A diff as HTML: figures, then each distinct edit with its picture, its places and its nodes behind a click."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from qpass.inspect.changes.change import Edit, Instance
from qpass.inspect.changes.diff_data import DiffData
from qpass.inspect.render.diff_text import figures, heading, metric, title
from qpass.inspect.render.page import MONO, block, details, escape, escape_lines, pairs, picture, quiet, table, tag
from qpass.inspect.render.picture import COLORS, draw
from qpass.inspect.values.path_patterns import path_patterns

REMOVED, ADDED = "color:#cf222e", "color:#1a7f37"
OPENED = 12
"""Edits that stand open; what follows is opened by a click."""
LISTED = 200
"""Places of an edit that are listed; all are in ``to_json()``."""


def html(diff: DiffData) -> str:
    """The static HTML of a diff."""
    head = tag("p", tag("b", "qpass diff"), " ", escape(title(diff)))
    if not diff:
        return block(head, tag("p", escape(f"no change in {len(diff.before)} nodes")))
    legend = " ".join(
        tag("span", kind, style=f"background:{fill};border:1px solid {border};border-radius:4px;padding:0 6px")
        for kind, (border, fill) in COLORS.items()
        if kind and getattr(diff, kind)
    )
    parts = [head, pairs(figures(diff)), tag("p", tag("small", legend))]
    parts += [_edit(number, edit, diff) for number, edit in enumerate(diff.edits, 1)]
    if diff.ops:
        rows = [[name, str(old), str(new), f"{new - old:+d}"] for name, (old, new) in diff.ops.items()]
        operators = table(["operator", "before", "after", "change"], rows, numbers=(1, 2, 3))
        parts.append(details(escape(f"{len(rows)} operators whose number changed"), operators))
    if diff.refusals:
        parts.append(tag("p", tag("b", "not done")))
        rows = []
        for (op, reason), views in diff.refusals.items():
            where = ", ".join(name for name, _ in path_patterns(view.module or view.path for view in views))
            rows.append([op, str(len(views)), reason, where])
        parts.append(table(["operation", "", "reason", "where"], rows, numbers=(1,)))
    return block(*parts)


def _edit(number: int, edit: Edit, diff: DiffData) -> str:
    path, count = heading(edit)
    said = [f"{name} {value}" for name, values in diff.metrics.items() if (value := metric(edit, values))]
    said += [f"by {', '.join(edit.passes)}"] if edit.passes else []
    summary = f"{quiet(str(number))} {tag('b', escape(path))}{escape(count)} {quiet('  '.join(said))}"
    before, after = edit.text
    lines = [tag("span", escape(f"- {line}"), style=REMOVED) for line in before]
    lines += [tag("span", escape(f"+ {line}"), style=ADDED) for line in after]
    change = tag("pre", "<br>".join(lines), style=f"{MONO};margin:4px 0;white-space:pre-wrap")
    svg = draw(edit.instances[0], diff.before, diff.after)
    shown = picture(svg, " -> ".join(("; ".join(before), "; ".join(after)))) if svg else ""
    shown_places = "\n".join(_places(edit.instances[:LISTED]))
    total = len(edit.instances)
    rest = quiet(f"and {total - LISTED} more") if total > LISTED else ""
    listed = tag("pre", escape_lines(shown_places), style=f"{MONO};margin:4px 0")
    listing = details(quiet(f"{total} place{'s' * (total > 1)}"), listed, rest)
    return details(summary, change, shown, listing, opened=number <= OPENED)


def _places(instances: Sequence[Instance]) -> Iterator[str]:
    """Module and node of each; a line of source that neighbours have in common, as layers have, stands above them."""
    for line, group in groupby(instances, key=lambda instance: instance.center.node.line):
        if line:
            yield line
        for instance in group:
            yield f"{'  ' if line else ''}{instance.module}  {instance.center.node.path}"
