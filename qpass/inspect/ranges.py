"""The ranges that the observers of a prepared model saw and chose, with a histogram where one was kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from qpass.capture.export import FirstBatch
from qpass.errors import InputError
from qpass.inspect.render.plot import plot_ranges
from qpass.inspect.render.ranges_table import html, text
from qpass.inspect.values.observed_range import ObservedRange
from qpass.ir.constants import Constants
from qpass.ir.regions import regions
from qpass.ir.source import module_path
from qpass.ir.training_modules import FoldedWeight
from qpass.quantize.passes.insert_observers import observers
from qpass.spec.fake_quantize import FakeQuantizeBase

BARS = 24
"""Bars of a histogram in text."""


class Ranges(tuple[ObservedRange, ...]):
    """All observers in the order of the graph; ``str()`` is a table with a small histogram in each line."""

    def __str__(self) -> str:
        return text(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": html(self)}

    def plot(self) -> Any:
        """A matplotlib figure: the histograms of the activations, the chosen range shaded."""
        return plot_ranges(self)


def ranges(prepared: torch.nn.Module) -> Ranges:
    """What the observers of ``prepared`` saw so far; those that saw nothing, and dynamic ones, are left out.

    Raises:
        InputError: the model is not a prepared graph.
    """
    graph = prepared.captured if isinstance(prepared, FirstBatch) else prepared
    if not isinstance(graph, fx.GraphModule):
        raise InputError(f"ranges takes a prepared model, not {type(graph).__name__}", hint="call qpass.prepare first")
    return Ranges(found for region in regions(graph) for found in _observed(region))


def _observed(gm: fx.GraphModule) -> Iterator[ObservedRange]:
    constants, told = Constants(gm), set()
    for node, name in observers(gm):
        module: Any = gm.get_submodule(name)
        rounds = isinstance(module, FakeQuantizeBase)
        observer: Any = module.activation_post_process if rounds else module
        low, high = getattr(observer, "min_val", None), getattr(observer, "max_val", None)
        if name in told or not observer.has_data or not isinstance(low, Tensor) or not isinstance(high, Tensor):
            continue
        told.add(name)
        chosen = observer.chosen_range() if hasattr(observer, "chosen_range") else (low, high)
        if rounds:
            scale, zero_point = module.calculate_qparams()
            chosen = [(code - zero_point) * scale for code in observer.spec.range]
        ends = float(chosen[0].min()), float(chosen[1].max())
        reader = next(iter(node.users), node)
        counts = getattr(observer, "histogram", None)
        yield ObservedRange(
            name, module_path(reader), observer.dtype, float(low.min()), float(high.max()), ends,
            _binned(counts) if isinstance(counts, Tensor) else (), _unfolded(gm, node.args[0]) in constants,
        )  # fmt: skip


def _unfolded(gm: fx.GraphModule, value: Any) -> Any:
    """The weight that training multiplies with the factor of a batch norm."""
    folded = value.op == "call_module" and isinstance(gm.get_submodule(value.target), FoldedWeight)
    return value.args[0] if folded else value


def _binned(histogram: Tensor) -> tuple[int, ...]:
    """The bins from the first to the last that counted anything, joined to at most ``BARS``."""
    filled = histogram.nonzero().flatten()
    if not len(filled):
        return ()
    used = histogram[int(filled[0]) : int(filled[-1]) + 1]
    return tuple(int(part.sum()) for part in used.tensor_split(min(BARS, len(used))))
