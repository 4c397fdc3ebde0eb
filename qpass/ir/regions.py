"""Regions: the sub-graphs that higher-order operators call (``cond``, ``while_loop``, ``scan``, ``torch.no_grad`` ...).

A region sees the outside only through its operands, so a weight arrives in it as an anonymous input. The passes here
make regions look like any other graph: constants are read inside by ``get_attr``, and a region that only switches
autograd off is dissolved. The graphs are edited in place; the caller recompiles them once, after all of its passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.alias import written_inputs
from qpass.ir.edit import Editor, free_name, get_constant, owner_of
from qpass.ir.gradient import DETACH, is_floating
from qpass.ir.origins import move_origin

Types = Mapping[str, Any]  # module path -> module type


def regions(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """``gm`` and every graph module below it that an operator calls, outer ones first, each once."""
    pending, seen = [gm], {id(gm)}
    while pending:
        region = pending.pop()
        yield region
        for _, module in _called(region):
            if id(module) not in seen:
                seen.add(id(module))
                pending.append(module)


def inline_set_grad(gm: fx.GraphModule, trains: bool = False) -> int:
    """``wrap_with_set_grad_enabled(mode, region, *operands)  ->  the nodes of region``, wherever it stands.

    The mode changes no value. In a graph that ``trains`` what comes out of a region without gradients is detached, and
    so is what the region writes into a tensor. Inlined nodes keep their metadata. Returns the number of calls inlined.
    """
    count = 0
    for region in list(regions(gm)):
        # A body may hold such calls itself; its nodes then stand in this graph, so look again until none is left.
        while calls := region.graph.find_nodes(op="call_function", target=_SET_GRAD):
            for call in calls:
                body = _bodies(region, call.args[:2])[0]
                if trains and not call.args[0]:
                    _stop_gradients(body)
                _inline(region, call, body, call.args[2:])
            count += len(calls)
    return count


def sink_constants(gm: fx.GraphModule, types: Types | None = None) -> int:
    """``cond(p, a, b, (x, weight))  ->  cond(p, a, b, (x,))``, where a and b read ``weight`` by ``get_attr``.

    The tensor inside is the very tensor outside. It works where the operator passes an operand on unchanged: all
    operands of ``cond`` and of the ``wrap`` family, the additional inputs of ``while_loop``, ``scan`` and ``map``.
    A loop's carried values vary and stay operands, and so do those of a region that several operators call.

    Dynamo traces most regions without module names. A node there that reads the constant ``encoder.weight`` is given
    the module path ``encoder``, of the type that ``types`` names for it, below the modules of the calling operator;
    other nodes get those of the operator alone.

    In grad mode torch traces the bodies of control flow again, with fake tensors, and fails on a real constant inside;
    so the operands of such a call are detached, and no gradient flows through it.

    Returns the number of operands that became constants inside.
    """
    count = 0
    callers = Counter(id(body) for region in regions(gm) for _, body in _called(region))
    for region in list(regions(gm)):  # outer first: what sinks into a region can sink on into a region inside it
        sunk: list[fx.Node] = []
        for call in region.graph.nodes:
            operands = operands_of(region, call)
            if operands is None:
                continue
            if all(callers[id(body)] == 1 for body in operands.bodies):
                sunk += _sink(region, call, operands)
            for body in operands.bodies:
                _name_modules(body, call, types or {})
        count += len(sunk)
        for node in [constant for constant in dict.fromkeys(sunk) if not constant.users]:
            region.graph.erase_node(node)
    if count:
        for region in regions(gm):
            _detach_operands(region)
    return count


_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled

# Where the operands stand that every body receives unchanged, as its last inputs: in one list argument ...
_LISTED = {"cond": 3, "while_loop": 3, "scan": 3, "associative_scan": 2, "map_impl": 2, "hints_wrapper": 1}
# ... or as all arguments from here on.
_SPREAD = {
    "wrap_with_set_grad_enabled": 2, "wrap_with_autocast": 5, "invoke_subgraph": 2, "wrap": 1,
    "tag_activation_checkpoint": 1, "wrap_activation_checkpoint": 1,
}  # fmt: skip


@dataclass(frozen=True)
class _Operands:
    """The operands that the bodies of one call receive unchanged, as their last inputs."""

    bodies: list[fx.GraphModule]
    values: tuple[Any, ...]
    args: Callable[[tuple[Any, ...]], tuple[Any, ...]]  # the call's arguments, from other values


def operands_of(gm: fx.GraphModule, call: fx.Node) -> _Operands | None:
    """The unchanged operands of a higher-order operator; None for other nodes and for conventions not known here."""
    if call.op != "call_function" or not isinstance(call.target, torch_private.HigherOrderOperator):
        return None
    name, args = call.target.name(), call.args
    if call.kwargs.get("mutated_arg_indices"):
        return None
    if name in _LISTED and len(args) > (at := _LISTED[name]) and isinstance(listed := args[at], (tuple, list)):
        rebuilt = tuple if isinstance(listed, tuple) else list
        values = tuple(listed)
        return _Operands(_bodies(gm, args[:at]), values, lambda new: (*args[:at], rebuilt(new), *args[at + 1 :]))
    if name in _SPREAD:
        at = _SPREAD[name]
        return _Operands(_bodies(gm, args[:at]), args[at:], lambda new: (*args[:at], *new))
    return None


def _bodies(gm: fx.GraphModule, arguments: tuple[Any, ...]) -> list[fx.GraphModule]:
    nodes = [argument for argument in arguments if isinstance(argument, fx.Node) and argument.op == "get_attr"]
    found: Iterator[Any] = (get_constant(gm, str(node.target)) for node in dict.fromkeys(nodes))
    return [body for body in found if isinstance(body, fx.GraphModule)]


def _called(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, fx.GraphModule]]:
    """Each use of a graph module by a node of ``gm``: the node that uses it, and the module."""
    for node in gm.graph.find_nodes(op="get_attr"):
        module: Any = get_constant(gm, node.target)
        if isinstance(module, fx.GraphModule):
            yield from ((user, module) for user in node.users)


def _inline(gm: fx.GraphModule, call: fx.Node, body: fx.GraphModule, operands: tuple[Any, ...]) -> None:
    """Put the nodes of ``body`` in front of ``call`` and its results in the place of the call's."""
    inputs = body.graph.find_nodes(op="placeholder")
    mapping: dict[fx.Node, Any] = dict(zip(inputs, operands, strict=True))
    with gm.graph.inserting_before(call):
        for node in body.graph.nodes:
            if node.op == "get_attr":
                mapping[node] = gm.graph.node_copy(node)
                mapping[node].target = _hold(gm, body, node.target)
            elif node.op not in ("placeholder", "output"):
                mapping[node] = gm.graph.node_copy(node, mapping.__getitem__)
    result: Any = fx.node.map_arg(body.graph.output_node().args[0], mapping.__getitem__)
    if isinstance(result, fx.Node):
        call.replace_all_uses_with(result)
    for user in list(call.users):  # a tuple of results is read by getitem alone
        user.replace_all_uses_with(result[user.args[1]])
        gm.graph.erase_node(user)
    holder = call.args[1]
    gm.graph.erase_node(call)
    if isinstance(holder, fx.Node) and not holder.users:
        gm.graph.erase_node(holder)


def _stop_gradients(body: fx.GraphModule) -> None:
    """Detach the results of a region, what it writes into a tensor, and the tensors from outside that it writes to."""
    editor = Editor(body, "inline_set_grad")
    for node in list(body.graph.nodes):
        writes = written_inputs(node)
        if node.op == "output":
            sources = node.all_input_nodes
        elif writes:
            sources = [s for s in node.all_input_nodes if s not in writes or s.op in ("placeholder", "get_attr")]
        else:
            continue
        for source in filter(is_floating, sources):
            node.replace_input_with(source, editor.call(DETACH, source, like=source, before=node))


def _sink(gm: fx.GraphModule, call: fx.Node, operands: _Operands) -> list[fx.Node]:
    """Move the constant operands of ``call`` into its bodies; the operands moved, one entry each."""
    constant = [_is_constant(gm, value) for value in operands.values]
    moved = [value for value, sinks in zip(operands.values, constant, strict=True) if sinks]
    if not moved or not operands.bodies:
        return []
    for body in operands.bodies:
        inputs = body.graph.find_nodes(op="placeholder")[-len(operands.values) :]
        for placeholder, value, sinks in zip(inputs, operands.values, constant, strict=True):
            if not sinks:
                continue
            if placeholder.users:
                with body.graph.inserting_before(placeholder):
                    name = _hold(body, gm, value.target)
                    inside = body.graph.create_node("get_attr", name)
                inside.meta = {**value.meta, **placeholder.meta}
                placeholder.replace_all_uses_with(inside)
            body.graph.erase_node(placeholder)
    call.args = operands.args(tuple(v for v, sinks in zip(operands.values, constant, strict=True) if not sinks))
    return moved


def without_gradient(gm: fx.GraphModule) -> list[fx.Node]:
    """The calls of ``cond``, ``while_loop`` and the like that no gradient passes: a body holds constants."""
    found = ((node, operands_of(gm, node)) for node in gm.graph.nodes)
    return [
        node for node, operands in found
        if operands is not None and node.target.name() in _LISTED and any(map(_holds_constants, operands.bodies))
    ]  # fmt: skip


def _detach_operands(gm: fx.GraphModule) -> None:
    """``cond(p, a, b, (x,))  ->  cond(p, a, b, (detach(x),))`` where a, b or a region in them holds constants."""
    editor = Editor(gm, "sink_constants")
    for call in without_gradient(gm):
        for source in call.all_input_nodes:
            val = source.meta.get("val")
            if isinstance(val, torch.Tensor) and val.is_floating_point() and source.target is not DETACH:
                call.replace_input_with(source, editor.call(DETACH, source, like=source, before=call))


def _holds_constants(body: fx.GraphModule) -> bool:
    attributes = ((region, node) for region in regions(body) for node in region.graph.find_nodes(op="get_attr"))
    return any(_is_constant(region, node) for region, node in attributes)


def _is_constant(gm: fx.GraphModule, value: Any) -> bool:
    return (
        isinstance(value, fx.Node)
        and value.op == "get_attr"
        and isinstance(get_constant(gm, str(value.target)), torch.Tensor)
    )


def _hold(gm: fx.GraphModule, source: fx.GraphModule, name: str) -> str:
    """Make the attribute ``name`` of ``source`` one of ``gm`` too, as what it is there; its name in ``gm``."""
    origin, leaf = owner_of(source, name)
    value = getattr(origin, leaf)
    held, name = name, free_name(gm, name)
    *path, last = name.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        if not hasattr(owner, part):
            owner.add_module(part, torch.nn.Module())
        owner = getattr(owner, part)
    if isinstance(value, torch.nn.Parameter):
        owner.register_parameter(last, value)
    elif isinstance(value, torch.Tensor):
        owner.register_buffer(last, value, persistent=leaf not in origin._non_persistent_buffers_set)
    else:
        setattr(owner, last, value)
    move_origin(source, held, gm, name)
    return name


def _name_modules(body: fx.GraphModule, call: fx.Node, types: Types) -> None:
    """Give the nodes of a region that name no module those of the call, and the owner of the constant they read."""
    outer = call.meta.get("nn_module_stack") or {}
    for node in body.graph.nodes:
        if node.op != "call_function" or node.meta.get("nn_module_stack"):
            continue
        stack = dict(outer)
        for source in node.all_input_nodes:
            path = str(source.target).rpartition(".")[0] if source.op == "get_attr" else ""
            if path and path in types:
                stack[path] = (path, types[path])
                break
        node.meta["nn_module_stack"] = stack
