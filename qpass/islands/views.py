"""Operations that only move values: codes pass through them as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

MOVES: frozenset[Any] = frozenset({
    aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
    aten.unflatten.int, aten.transpose.int, aten.t.default, aten.permute.default, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int,
    aten.expand.default, aten.contiguous.default, aten.clone.default, aten.movedim.int, aten.narrow.default,
    aten.pixel_shuffle.default, aten.numpy_T.default, aten.mT.default, aten.alias.default, aten.detach.default,
})  # fmt: skip
"""x -> f(x), every value of the result is a value of ``x``: f(dq(q)) == dq(f(q)) bit for bit."""

MONOTONE: frozenset[Any] = frozenset({
    aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default,
})  # fmt: skip
"""x -> f(x) that selects a maximum: exact for dq because a positive scale keeps the order of codes."""

JOINS: frozenset[Any] = frozenset({aten.cat.default})
"""[x, ...] -> f: exact when all inputs share their qparams."""


def carried(node: fx.Node) -> tuple[fx.Node, ...]:
    """The inputs whose values ``node`` passes on unchanged; empty for any other operation."""
    if node.op != "call_function":
        return ()
    if node.target in MOVES or node.target in MONOTONE:
        return (node.args[0],)  # type: ignore[return-value]
    if node.target in JOINS and isinstance(node.args[0], (list, tuple)):
        return tuple(item for item in node.args[0] if isinstance(item, fx.Node))
    return ()
