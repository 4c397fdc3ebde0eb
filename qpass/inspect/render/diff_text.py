"""A diff as text: what came and went in figures, then each distinct edit once, as ``- before`` and ``+ after``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from qpass.inspect.changes.change import Edit
from qpass.inspect.changes.diff_data import DiffData
from qpass.inspect.render.ascii import ascii_only
from qpass.inspect.render.quantity import quantity
from qpass.inspect.render.table import table
from qpass.inspect.values.path_patterns import path_patterns

Line = tuple[tuple[str, str], ...]  # pieces of a line: (text, style)

STYLES = {"removed": "red", "added": "green", "path": "bold", "count": "bold cyan", "quiet": "dim", "": ""}


def text(diff: DiffData) -> str:
    """The text of a diff, in ASCII."""
    return "\n".join(ascii_only("".join(piece for piece, _ in line)).rstrip() for line in lines(diff))


def rich_text(diff: DiffData) -> Any:
    """The same lines as a ``rich.text.Text`` in colour."""
    from rich.text import Text

    result = Text(no_wrap=True, overflow="ignore")
    for number, line in enumerate(lines(diff)):
        result.append("\n" if number else "")
        for piece, style in line:
            result.append(ascii_only(piece), style=STYLES[style])
    return result


def lines(diff: DiffData) -> Iterator[Line]:
    """The lines of a diff in styled pieces."""
    yield (("qpass diff", "path"), (f"  {title(diff)}", ""))
    if not diff:
        yield ((f"  no change in {len(diff.before)} nodes", ""),)
        return
    for name, figure in figures(diff):
        yield ((f"  {name:<12}", "quiet"), (figure, ""))
    for number, edit in enumerate(diff.edits, 1):
        yield ()
        yield from _edit(number, edit, diff)
    if diff.ops:
        yield ()
        rows = [[name, f"{old:6}", f"{new:6}", f"{new - old:+7}"] for name, (old, new) in diff.ops.items()]
        yield from ((((line, "")),) for line in table(["operator", "before", " after", " change"], rows))
    for (op, reason), views in diff.refusals.items():
        yield ()
        places = [name for name, _ in path_patterns(view.module or view.path for view in views)]
        yield ((f"not done: {op} x{len(views)}: {reason}", ""),)
        yield ((f"  in {', '.join(places)}", "quiet"),)


def title(diff: DiffData) -> str:
    """``"prepared -> quantized"``, by stage, by file, or just by being before and after."""
    if diff.name:
        return diff.name
    names = [graph.label or graph.stage or other for graph, other in ((diff.before, "before"), (diff.after, "after"))]
    return f"{names[0]} -> {names[1]}"


def figures(diff: DiffData) -> Iterator[tuple[str, str]]:
    """The figures of the whole diff: (name, figure)."""
    before, after = diff.before, diff.after
    counts = [("+", "added"), ("-", "removed"), ("~", "rewired"), ("~", "retargeted")]
    parts = [f"{sign}{count} {kind}" for sign, kind in counts if (count := len(getattr(diff, kind)))]
    kept, added, removed = len(diff.matched), len(diff.added), len(diff.removed)
    yield "nodes", f"{kept + removed} -> {kept + added}   {'  '.join(parts)}"
    old, new = before.constant_bytes, after.constant_bytes
    is_whole = kept + removed == len(before)
    if is_whole and (old or new):
        yield "constants", f"{quantity(old)} -> {quantity(new)}" + (f" ({100 * new / old:.1f} %)" if old else "")
    if is_whole and (before.sent_bytes or after.sent_bytes):
        yield "sent", f"{quantity(before.sent_bytes)} -> {quantity(after.sent_bytes)} a rank and call"
    places = len(diff.instances)
    yield "edits", f"{len(diff.edits)} distinct, at {places} place{'s' * (places > 1)}"
    for name, values in diff.metrics.items():
        worst = min(values.items(), key=lambda item: item[1], default=None)
        if worst:
            yield f"worst {name}", f"{worst[1]:.1f} at {worst[0]}"


def heading(edit: Edit) -> tuple[str, str]:
    """The places of an edit, ``("blocks.{0..3}.fc", " x4")``."""
    count = len(edit.instances)
    return edit.pattern or "(top level)", f" x{count}" if count > 1 else ""


def metric(edit: Edit, values: Any) -> str:
    """The smallest figure of an edit's nodes, or ``""``."""
    views = [change.after for instance in edit.instances for change in instance.changes if change.after]
    found = [values[view.path] for view in views if view.path in values]
    return f"{min(found):.1f}" if found else ""


def _edit(number: int, edit: Edit, diff: DiffData) -> Iterator[Line]:
    path, count = heading(edit)
    said = [f"{name} {value}" for name, values in diff.metrics.items() if (value := metric(edit, values))]
    aside = "   ".join([*said, *([f"by {', '.join(edit.passes)}"] if edit.passes else [])])
    yield ((f"[{number}] ", "quiet"), (path, "path"), (count, "count"), (f"   {aside}" if aside else "", "quiet"))
    before, after = edit.text
    for line in before:
        yield ((f"    - {line}", "removed"),)
    for line in after:
        yield ((f"    + {line}", "added"),)
