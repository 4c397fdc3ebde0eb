"""Whether two traces of one model, at different input sizes, are the same program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.edit import get_constant
from qpass.ir.normalize import is_whole_slice


def same_operators(dynamic: fx.GraphModule, static: fx.GraphModule) -> bool:
    """Whether ``static`` runs the tensor operators of ``dynamic``, in the same order, on the same operands.

    Computations of sizes are left out, and a size that ``dynamic`` computes matches any number in ``static``. So are
    whole slices: ``x[:, 0]`` is traced as ``select(slice(x))`` or ``select(x)``, and ``x[:]`` as a slice or an alias;
    and, where nothing is written to, ``contiguous``, which is traced where the sizes ask for a copy. Regions are
    compared likewise.
    """
    return pair_operators(dynamic, static)[1] is None


def pair_operators(dynamic: fx.GraphModule, static: fx.GraphModule) -> tuple[dict[fx.Node, fx.Node], fx.Node | None]:
    """``{node of dynamic: the same of static}`` as far as :func:`same_operators` holds, and the first node (of either)
    where it holds no longer, None where it holds to the end. The nodes of regions are paired too."""
    twin: dict[fx.Node, fx.Node] = {}
    left_out = _left_out(dynamic, static)
    for ours, theirs in zip_longest(_steps(dynamic.graph, left_out), _steps(static.graph, left_out)):
        if ours is None or theirs is None or ours.op != theirs.op:
            ended = ours is None or ours.op == "output"
            return twin, theirs if ended else ours
        if ours.op == "call_function" and ours.target is not theirs.target:
            return twin, ours
        if ours.op == "get_attr" and (difference := _attribute_difference(dynamic, ours, static, theirs, twin)):
            return twin, difference
        if not _match((ours.args, ours.kwargs), (theirs.args, theirs.kwargs), twin, left_out):
            return twin, ours
        twin[ours] = theirs
    return twin, None


_LeftOut = Callable[[fx.Node], bool]


def _left_out(*graphs: fx.GraphModule) -> _LeftOut:
    if any(_writes(node) for gm in graphs for node in gm.graph.nodes):  # a copy shields its source
        return _is_whole
    return lambda node: _is_whole(node) or node.target is torch.ops.aten.contiguous.default


def _is_whole(node: fx.Node) -> bool:
    return is_whole_slice(node) or node.target is torch.ops.aten.alias.default


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch_private.OpOverload) and node.target._schema.is_mutable


def _steps(graph: fx.Graph, left_out: _LeftOut) -> list[fx.Node]:
    return [
        node
        for node in graph.nodes
        if node.op != "call_function" or (_holds_tensor(node.meta.get("val")) and not left_out(node))
    ]


def _origin(node: fx.Node, left_out: _LeftOut) -> fx.Node:
    while left_out(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _holds_tensor(val: Any) -> bool:
    if isinstance(val, (tuple, list)):
        return any(map(_holds_tensor, val))
    return isinstance(val, torch.Tensor)


def _attribute_difference(
    dynamic: fx.GraphModule, ours: fx.Node, static: fx.GraphModule, theirs: fx.Node, twin: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    a: Any = get_constant(dynamic, str(ours.target))
    b: Any = get_constant(static, str(theirs.target))
    if isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule):
        inner, difference = pair_operators(a, b)
        twin.update(inner)
        return difference
    return None if ours.target == theirs.target else ours


def _match(ours: Any, theirs: Any, twin: Mapping[fx.Node, fx.Node], left_out: _LeftOut) -> bool:
    if isinstance(ours, fx.Node):
        origin = _origin(ours, left_out)
        if origin in twin:
            return isinstance(theirs, fx.Node) and twin[origin] is _origin(theirs, left_out)
        return isinstance(theirs, (int, float, fx.Node))  # a size: a number where it is static
    if isinstance(ours, (tuple, list)):
        if not isinstance(theirs, (tuple, list)) or len(ours) != len(theirs):
            return False
        return all(_match(a, b, twin, left_out) for a, b in zip(ours, theirs, strict=True))
    if isinstance(ours, Mapping):
        return (
            isinstance(theirs, Mapping)
            and ours.keys() == theirs.keys()
            and all(_match(ours[key], theirs[key], twin, left_out) for key in ours)
        )
    if isinstance(ours, slice):
        return isinstance(theirs, slice) and _match(
            (ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step), twin, left_out
        )
    return type(ours) is type(theirs) and ours == theirs
