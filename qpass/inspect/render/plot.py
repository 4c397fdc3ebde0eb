"""Figures by matplotlib, which the extra ``viz`` brings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qpass.errors import InputError
from qpass.inspect.values.noise import NoiseData
from qpass.inspect.values.observed_range import ObservedRange


def plot_sqnr(found: NoiseData) -> Any:
    """dB along the graph; the nodes that add most noise are named."""
    figure = _figure(9, 3.4)
    axes = figure.add_subplot()
    at = [place for place, noise in enumerate(found.nodes) if math.isfinite(noise.sqnr)]
    axes.plot(at, [found.nodes[place].sqnr for place in at], "-o", markersize=3, linewidth=1, color="#0969da")
    costly = {noise.node.path for noise in found.costliest(5)}
    for place in at:
        noise = found.nodes[place]
        if noise.node.path in costly:
            axes.plot([place], [noise.sqnr], "o", color="#cf222e", markersize=5)
            label = noise.node.module or noise.node.path
            axes.annotate(label, (place, noise.sqnr), (0, 7), textcoords="offset points", ha="center", fontsize=7)
    axes.set(xlabel="node, in the order of the graph", ylabel="SQNR (dB)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def plot_ranges(found: Sequence[ObservedRange]) -> Any:
    """A small histogram for each observer that counts, with the chosen range shaded; others as their range alone."""
    shown = [one for one in found if not one.weight] or list(found)
    columns = min(4, len(shown)) or 1
    rows = math.ceil(len(shown) / columns) or 1
    figure = _figure(2.6 * columns, 1.7 * rows)
    for place, one in enumerate(shown, 1):
        axes = figure.add_subplot(rows, columns, place)
        axes.axvspan(*one.chosen, color="#dafbe1")
        if one.counts:
            width = (one.high - one.low) / len(one.counts) or 1.0
            edges = [one.low + width * (number + 0.5) for number in range(len(one.counts))]
            axes.bar(edges, one.counts, width=width, color="#0969da")
            axes.set_yscale("log")
        axes.set_title(one.module or one.name, fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set_yticks([])
    figure.tight_layout()
    return figure


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plots need matplotlib, which is not installed", hint="pip install 'qpass[viz]'") from error
    return Figure(figsize=(width, height), dpi=110)
