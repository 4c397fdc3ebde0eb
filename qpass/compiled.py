"""The lowered graphs behind compiled models, kept for the report as long as their weights live."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import fx

_COMPILED: list[tuple[fx.GraphModule, list[weakref.ref[torch.Tensor]]]] = []


def remember(graph: fx.GraphModule, weights: Iterable[torch.Tensor]) -> None:
    """Keep ``graph`` until the last of the weights that it was compiled with is gone."""
    _COMPILED[:] = [(kept, read) for kept, read in _COMPILED if any(ref() is not None for ref in read)]
    _COMPILED.append((graph, [weakref.ref(tensor) for tensor in weights]))


def compiled_graphs(model: torch.nn.Module) -> list[fx.GraphModule]:
    """The lowered graphs that the backend compiled for ``model``: those that read one of its tensors."""
    tensors = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    return [graph for graph, read in _COMPILED if any((t := ref()) is not None and id(t) in tensors for ref in read)]
