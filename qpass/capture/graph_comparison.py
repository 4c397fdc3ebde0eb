"""Whether two traces of one model, at different input sizes, are the same program."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.attributes import get_constant
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
    left_out = left_out_of(dynamic, static)

    def same(ours: fx.Node, theirs: Any) -> bool:
        source = origin(ours, left_out)
        if source in twin:
            return isinstance(theirs, fx.Node) and twin[source] is origin(theirs, left_out)
        return isinstance(theirs, (int, float, fx.Node))  # a size: a number where it is static

    for ours, theirs in zip_longest(steps(dynamic.graph, left_out), steps(static.graph, left_out)):
        if ours is None or theirs is None or ours.op != theirs.op:
            ended = ours is None or ours.op == "output"
            return twin, theirs if ended else ours
        if ours.op == "call_function" and ours.target is not theirs.target:
            return twin, ours
        if ours.op == "get_attr" and (difference := attribute_difference(dynamic, ours, static, theirs, twin)):
            return twin, difference
        if not match_arguments((ours.args, ours.kwargs), (theirs.args, theirs.kwargs), same):
            return twin, ours
        twin[ours] = theirs
    return twin, None


LeftOut = Callable[[fx.Node], bool]


def left_out_of(*graphs: fx.GraphModule) -> LeftOut:
    """Which operators change no value, and so may stand in one trace only."""
    if any(_writes(node) for gm in graphs for node in gm.graph.nodes):  # a copy shields its source
        return _is_whole
    return lambda node: _is_whole(node) or node.target is torch.ops.aten.contiguous.default


def _is_whole(node: fx.Node) -> bool:
    return is_whole_slice(node) or node.target is torch.ops.aten.alias.default


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch_private.OpOverload) and node.target._schema.is_mutable


def steps(graph: fx.Graph, left_out: LeftOut) -> list[fx.Node]:
    """The nodes that two traces have in common: inputs, constants and operators on tensors."""
    return [
        node
        for node in graph.nodes
        if node.op != "call_function" or (_holds_tensor(node.meta.get("val")) and not left_out(node))
    ]


def origin(node: fx.Node, left_out: LeftOut) -> fx.Node:
    """The node whose values a node has by operators that are left out."""
    while left_out(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _holds_tensor(val: Any) -> bool:
    if isinstance(val, (tuple, list)):
        return any(map(_holds_tensor, val))
    return isinstance(val, torch.Tensor)


def attribute_difference(
    dynamic: fx.GraphModule, ours: fx.Node, static: fx.GraphModule, theirs: fx.Node, twin: dict[fx.Node, fx.Node]
) -> fx.Node | None:
    """The first node that differs where two constants differ, or two regions; None where they are the same."""
    a: Any = get_constant(dynamic, str(ours.target))
    b: Any = get_constant(static, str(theirs.target))
    if isinstance(a, fx.GraphModule) and isinstance(b, fx.GraphModule):
        inner, difference = pair_operators(a, b)
        twin.update(inner)
        return difference
    unknown = torch_private.is_fake(a) or torch_private.is_fake(b)  # of a region: it says nothing but its name
    return None if (ours.target == theirs.target if unknown else same_values(a, b)) else ours


def same_values(a: Any, b: Any) -> bool:
    """Whether two constants are one tensor, or equal: a literal of the forward's code is a new one in each trace."""
    if a is b or not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a is b
    if (a.shape, a.dtype, a.device, a.layout) != (b.shape, b.dtype, b.device, b.layout) or a.layout != torch.strided:
        return False
    return bool(((a == b) | ((a != a) & (b != b))).all())


def match_arguments(ours: Any, theirs: Any, same: Callable[[fx.Node, Any], bool]) -> bool:
    """Whether two nests of arguments are equal, where ``same(our node, their argument)`` says what nodes stand for."""
    if isinstance(ours, fx.Node):
        return same(ours, theirs)
    if isinstance(ours, (tuple, list)):
        if not isinstance(theirs, (tuple, list)) or len(ours) != len(theirs):
            return False
        return all(match_arguments(a, b, same) for a, b in zip(ours, theirs, strict=True))
    if isinstance(ours, Mapping):
        return (
            isinstance(theirs, Mapping)
            and ours.keys() == theirs.keys()
            and all(match_arguments(ours[key], theirs[key], same) for key in ours)
        )
    if isinstance(ours, slice):
        return isinstance(theirs, slice) and match_arguments(
            (ours.start, ours.stop, ours.step), (theirs.start, theirs.stop, theirs.step), same
        )
    return type(ours) is type(theirs) and ours == theirs
