"""Noise by node as a table: the ten nodes with the lowest ratio, and how much of it is their own noise."""

from __future__ import annotations

import math

from qpass.inspect.render import page
from qpass.inspect.render.ascii import ascii_only
from qpass.inspect.render.table import table
from qpass.inspect.values.noise import NodeNoise, NoiseData

HEADER = ("node", "module", "operator", "dB", "own")


def text(found: NoiseData) -> str:
    """The table in ASCII."""
    lines = [_cells(noise) for noise in found.worst()]
    lines = [[*line[:3], f"{line[3]:>6}", f"{line[4]:>6}"] for line in lines]
    title = _title(found)
    header = ["node", "module", "operator", "    dB", "   own"]
    return "\n".join(ascii_only(line) for line in [title, *table(header, lines), *_left_out(found)])


def html(found: NoiseData) -> str:
    """The table as HTML, all nodes behind a click."""
    worst = page.table(HEADER, map(_cells, found.worst()), numbers=(3, 4))
    everything = page.table(HEADER, map(_cells, found.nodes), numbers=(3, 4))
    title = page.tag("p", page.tag("b", page.escape(_title(found))))
    notes = [page.tag("p", page.quiet(line)) for line in _left_out(found)]
    return page.block(title, worst, page.details(page.quiet(f"all {len(found)} nodes"), everything), *notes)


def figure(ratio: float) -> str:
    """``"23.4"``; ``"exact"`` without noise."""
    return "exact" if ratio == math.inf else f"{ratio:.1f}"


def _title(found: NoiseData) -> str:
    exact = sum(noise.sqnr == math.inf for noise in found.nodes)
    return f"SQNR of {len(found)} nodes, {exact} of them exact; the worst {min(10, len(found))}"


def _left_out(found: NoiseData) -> list[str]:
    return [
        f"not compared: {count} operations in the region {region}, which runs as one; its result is"
        for region, count in found.regions.items()
    ]


def _cells(noise: NodeNoise) -> list[str]:
    view = noise.node
    own = "-" if noise.own == math.inf else f"{noise.own:.1f}"
    return [view.path, view.module or "-", view.short, figure(noise.sqnr), own]
