"""Edits that make a region like any other graph: it reads its constants itself, or is dissolved into the graph around.

A region sees the outside only through its operands, so a weight arrives in it as an anonymous input. The passes here
let the region read constants by ``get_attr``, and dissolve a region that only switches autograd off. The graphs are
edited in place; the caller recompiles them once, after all of its passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from qpass.ir.alias import written_inputs
from qpass.ir.attributes import free_name, owner_of
from qpass.ir.editor import Editor
from qpass.ir.gradient import DETACH, is_floating
from qpass.ir.origins import move_origin
from qpass.ir.regions import Operands, bodies_of, called, is_constant, operands_of, regions, without_gradient

Types = Mapping[str, Any]  # module path -> module type

_SET_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled


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
                body = bodies_of(region, call.args[:2])[0]
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
    callers = Counter(id(body) for region in regions(gm) for _, body in called(region))
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


def _sink(gm: fx.GraphModule, call: fx.Node, operands: Operands) -> list[fx.Node]:
    """Move the constant operands of ``call`` into its bodies; the operands moved, one entry each."""
    constant = [is_constant(gm, value) for value in operands.values]
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


def _detach_operands(gm: fx.GraphModule) -> None:
    """``cond(p, a, b, (x,))  ->  cond(p, a, b, (detach(x),))`` where a, b or a region in them holds constants."""
    editor = Editor(gm, "sink_constants")
    for call in without_gradient(gm):
        for source in call.all_input_nodes:
            val = source.meta.get("val")
            if isinstance(val, torch.Tensor) and val.is_floating_point() and source.target is not DETACH:
                call.replace_input_with(source, editor.call(DETACH, source, like=source, before=call))


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
