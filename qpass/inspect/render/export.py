"""A diff for other programs: JSON and Graphviz' dot."""

from __future__ import annotations

import json
import math
from typing import Any

from qpass.inspect.changes.diff_data import DiffData
from qpass.inspect.changes.expression import short_name
from qpass.inspect.render.ascii import ascii_only
from qpass.inspect.render.diff_text import heading
from qpass.inspect.values.nodes import NodeView

_COLORS = {"added": "#dafbe1", "removed": "#ffebe9", "rewired": "#fff8c5", "retargeted": "#fbefff"}


def to_json(diff: DiffData) -> str:
    """The diff in objects, lists, strings and numbers; keys sorted, infinite figures as strings."""
    content = {
        "before": {"stage": diff.before.stage, "file": diff.before.label, "nodes": len(diff.before),
                   "constant_bytes": diff.before.constant_bytes, "sent_bytes": diff.before.sent_bytes},
        "after": {"stage": diff.after.stage, "file": diff.after.label, "nodes": len(diff.after),
                  "constant_bytes": diff.after.constant_bytes, "sent_bytes": diff.after.sent_bytes},
        "added": [_node(view) for view in diff.added],
        "removed": [_node(view) for view in diff.removed],
        "rewired": [[_node(old), _node(new)] for old, new in diff.rewired],
        "retargeted": [[_node(old), _node(new)] for old, new in diff.retargeted],
        "matched": [[old.path, new.path] for old, new in diff.matched],
        "edits": [
            {"where": edit.pattern, "count": len(edit.instances), "before": edit.text[0], "after": edit.text[1],
             "passes": edit.passes, "places": [[i.module, i.center.node.path] for i in edit.instances]}
            for edit in diff.edits
        ],
        "operators": {name: {"before": old, "after": new} for name, (old, new) in diff.ops.items()},
        "refusals": [
            {"operation": op, "reason": reason, "nodes": [view.path for view in views]}
            for (op, reason), views in diff.refusals.items()
        ],
        "metrics": {
            name: {key: number(value) for key, value in values.items()} for name, values in diff.metrics.items()
        },
    }  # fmt: skip
    return json.dumps(content, indent=1, sort_keys=True)


def to_dot(diff: DiffData) -> str:
    """One cluster a distinct edit, drawn at its first place; nodes are coloured by what happened to them."""
    lines = ["digraph diff {", '  node [shape=box, style="rounded,filled", fillcolor="#f6f8fa", fontname=monospace];']
    for position, edit in enumerate(diff.edits):
        instance = edit.instances[0]
        lines.append(f"  subgraph cluster_{position} {{ label={_quoted(''.join(heading(edit)))};")
        for side, graph in (("before", diff.before), ("after", diff.after)):
            members = {getattr(c, side).index: c.kind for c in instance.changes if getattr(c, side)}
            shown = dict.fromkeys(source for index in members for source in graph.nodes[index].inputs) | members
            for index, kind in shown.items():
                label = _quoted(f"{short_name(graph.nodes[index])}\n{graph.nodes[index].name}")
                color = f', fillcolor="{_COLORS[kind]}"' if kind else ""
                lines.append(f"    {side}_{position}_{index} [label={label}{color}];")
            for index in members:
                for source in graph.nodes[index].inputs:
                    lines.append(f"    {side}_{position}_{source} -> {side}_{position}_{index};")
        lines.append("  }")
    return "\n".join([*lines, "}"])


def number(value: float) -> float | str:
    """A figure as JSON takes it."""
    return value if math.isfinite(value) else str(value)


def _node(view: NodeView) -> dict[str, Any]:
    return {"name": view.path, "operator": view.operator, "module": view.module, "form": view.form, "line": view.line}


def _quoted(text: str) -> str:
    """A string of dot's language; ``\\n`` alone keeps its meaning."""
    lines = (ascii_only(line).replace("\\", "\\\\").replace('"', '\\"') for line in text.split("\n"))
    return '"' + "\\n".join(lines) + '"'
