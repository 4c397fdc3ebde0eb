"""Regions: the sub-graphs that higher-order operators call (``cond``, ``while_loop``, ``scan``, ``torch.no_grad`` ...).

A region sees the outside only through its operands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.attributes import get_constant


def regions(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``gm`` and every graph module below it that an operator calls, outer ones first, each once."""
    pending, seen = [gm], {id(gm)}
    while pending:
        region = pending.pop()
        yield region
        for _, module in called(region):
            if id(module) not in seen:
                seen.add(id(module))
                pending.append(module)


# Where the operands stand that every body receives unchanged, as its last inputs: in one list argument ...
_LISTED = {"cond": 3, "while_loop": 3, "scan": 3, "associative_scan": 2, "map_impl": 2, "hints_wrapper": 1}
# ... or as all arguments from here on.
_SPREAD = {
    "wrap_with_set_grad_enabled": 2, "wrap_with_autocast": 5, "invoke_subgraph": 2, "wrap": 1,
    "tag_activation_checkpoint": 1, "wrap_activation_checkpoint": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Operands:
    """The operands that the bodies of one call receive unchanged, as their last inputs."""

    bodies: list[fx.GraphModule]
    values: tuple[Any, ...]
    args: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # the call's arguments, from other values


def operands_of(gm: fx.GraphModule, call: fx.Node) -> Operands | None:
    """The unchanged operands of a higher-order operator; None for other nodes and for conventions not known here."""
    if call.op != "call_function" or not isinstance(call.target, torch_private.HigherOrderOperator):
        return None
    name, args = call.target.name(), call.args
    if call.kwargs.get("mutated_arg_indices"):
        return None
    if name in _LISTED and len(args) > (at := _LISTED[name]) and isinstance(listed := args[at], (tuple, list)):
        rebuilt = tuple if isinstance(listed, tuple) else list
        values = tuple(listed)
        return Operands(bodies_of(gm, args[:at]), values, lambda new: (*args[:at], rebuilt(new), *args[at + 1 :]))
    if name in _SPREAD:
        at = _SPREAD[name]
        return Operands(bodies_of(gm, args[:at]), args[at:], lambda new: (*args[:at], *new))
    return None


def bodies_of(gm: fx.GraphModule, arguments: tuple[Any, ...]) -> list[fx.GraphModule]:
    """The graph modules that ``get_attr`` nodes among ``arguments`` read."""
    nodes = [argument for argument in arguments if isinstance(argument, fx.Node) and argument.op == "get_attr"]
    found: Iterator[Any] = (get_constant(gm, str(node.target)) for node in dict.fromkeys(nodes))
    return [body for body in found if isinstance(body, fx.GraphModule)]


def called(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Each use of a graph module by a node of ``gm``: the node that uses it, and the module."""
    for node in gm.graph.find_nodes(op="get_attr"):
        module: Any = get_constant(gm, node.target)
        if isinstance(module, fx.GraphModule):
            yield from ((user, module) for user in node.users)


def without_gradient(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of ``cond``, ``while_loop`` and the like that no gradient passes: a body holds constants."""
    found = ((node, operands_of(gm, node)) for node in gm.graph.nodes)
    return [
        node for node, operands in found
        if operands is not None and node.target.name() in _LISTED and any(map(_holds_constants, operands.bodies))
    ]  # fmt: skip


def _holds_constants(body: fx.GraphModule) -> bool:
    attributes = ((region, node) for region in regions(body) for node in region.graph.find_nodes(op="get_attr"))
    return any(is_constant(region, node) for region, node in attributes)


def is_constant(gm: fx.GraphModule, value: Any) -> bool:
    """Whether ``value`` is a node that reads a tensor of ``gm``."""
    return (
        isinstance(value, fx.Node)
        and value.op == "get_attr"
        and isinstance(get_constant(gm, str(value.target)), torch.Tensor)
    )
