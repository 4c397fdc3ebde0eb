"""An edit as a picture: the nodes around it before, an arrow, the nodes around it after."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import NamedTuple

from qpass.inspect.changes.change import Instance
from qpass.inspect.changes.expression import short_name
from qpass.inspect.render.ascii import ascii_only
from qpass.inspect.render.layout import layered
from qpass.inspect.values.nodes import NodeView, Snapshot

MOST = 24
"""Nodes beyond which a picture shows less than the text."""
HEIGHT, GAP, CHARACTER = 22, 40, 6.6

COLORS = {  # border, fill
    "added": ("#1a7f37", "#dafbe1"), "removed": ("#cf222e", "#ffebe9"), "rewired": ("#9a6700", "#fff8c5"),
    "retargeted": ("#8250df", "#fbefff"), "": ("#8c959f", "#f6f8fa"),
}  # fmt: skip


class Side(NamedTuple):
    """One half of a picture: what stands in the boxes, the kind of each change, and who reads whom."""

    labels: list[str]
    kinds: list[str]
    edges: list[tuple[int, int]]


def draw(instance: Instance, before: Snapshot, after: Snapshot) -> str:
    """The SVG of one instance, or ``""`` when it holds more nodes than a picture is good for."""
    old = {c.before.index: (c.before, c.kind) for c in instance.changes if c.before}
    new = {c.after.index: (c.after, c.kind) for c in instance.changes if c.after}
    if max(len(old), len(new)) > MOST:
        return ""
    sides = [_side(graph, members) for graph, members in ((before, old), (after, new))]
    drawn = [_half(side) for side in sides if side.labels]
    if not drawn:
        return ""
    tall = max(height for _, _, height in drawn)
    x, parts = 8.0, []
    for number, (body, width, height) in enumerate(drawn):
        if number:
            parts.append(f'<text x="{x + 14:.0f}" y="{tall / 2 + 14:.0f}" font-size="18" fill="#57606a">&#8594;</text>')
            x += 36
        parts.append(f'<g transform="translate({x:.0f},{8 + (tall - height) / 2:.0f})">{body}</g>')
        x += width + 8
    wide, high = x, tall + 16
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide:.0f}" height="{high:.0f}" '
        f'font-family="monospace" font-size="11" text-anchor="middle">'
        f'<rect width="100%" height="100%" rx="6" fill="#fff"/>{"".join(parts)}</svg>'
    )


def _side(graph: Snapshot, members: Mapping[int, tuple[NodeView, str]]) -> Side:
    shown: dict[int, str] = {}
    for index, (view, kind) in members.items():
        shown |= {source: "" for source in view.inputs if source not in shown}
        shown[index] = kind
    shown = {index: kind for index, kind in shown.items() if not _is_qparams(graph.nodes[index])}
    order = sorted(shown)
    number = {index: place for place, index in enumerate(order)}
    edges = {
        (number[source], number[index])
        for index in members for source in graph.nodes[index].inputs if source in number and index in number
    }  # fmt: skip
    labels = [ascii_only(short_name(graph.nodes[index])) for index in order]
    return Side([_short(label) for label in labels], [shown[index] for index in order], sorted(edges))


def _is_qparams(view: NodeView) -> bool:
    """Scales and zero points that are stored beside codes: they are always there, and crowd a picture."""
    return view.op == "get_attr" and view.operator.rstrip("_0123456789").endswith(("_scale", "_zero_point"))


def _half(side: Side) -> tuple[str, float, float]:
    """The SVG of one side, its width and its height."""
    widths = [CHARACTER * len(label) + 14 for label in side.labels]
    places = layered(len(side.labels), side.edges, max(widths) + 12, GAP)
    left = max(widths[node] / 2 - x for node, (x, _) in places.items())
    at = {node: (x + left, y + HEIGHT / 2) for node, (x, y) in places.items()}
    lines = []
    for source, target in side.edges:
        (x1, y1), (x2, y2) = at[source], at[target]
        y1, y2 = y1 + HEIGHT / 2, y2 - HEIGHT / 2
        bend = (y2 - y1) / 2
        lines.append(f"M{x1:.0f} {y1:.0f}C{x1:.0f} {y1 + bend:.0f} {x2:.0f} {y2 - bend:.0f} {x2:.0f} {y2:.0f}")
    body = f'<path d="{"".join(lines)}" fill="none" stroke="#8c959f"/>' if lines else ""
    for node, (x, y) in at.items():
        border, fill = COLORS[side.kinds[node]]
        body += (
            f'<rect x="{x - widths[node] / 2:.0f}" y="{y - HEIGHT / 2:.0f}" width="{widths[node]:.0f}" '
            f'height="{HEIGHT}" rx="4" fill="{fill}" stroke="{border}"/>'
            f'<text x="{x:.0f}" y="{y + 4:.0f}">{html.escape(side.labels[node])}</text>'
        )
    width = max(x + widths[node] / 2 for node, (x, _) in at.items())
    return body, width, max(y for _, y in at.values()) + HEIGHT / 2


def _short(label: str) -> str:
    return label if len(label) <= 28 else f"{label[:25]}..."
