"""Capture of a Dynamo graph: pre-dispatch ATen whose parameters and buffers are ``get_attr`` constants.

Dynamo hands a backend a graph of Python-level calls in which everything is an argument: the model's own tensors
first met as attributes, the user's inputs, and the sizes of dynamic dimensions. The passes need ATen, and need to
know which tensors are *weights*. This file translates the graph, and keeps which argument feeds which constant.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qpass import torch_private
from qpass.capture.fake_dtypes import correct_vals
from qpass.ir.alias import arguments, written_inputs
from qpass.ir.attributes import free_name, get_constant, set_constant
from qpass.ir.origins import origins
from qpass.ir.regions import regions
from qpass.ir.source import clean_path
from qpass.torch_private import FakeTensor, FakeTensorMode, TracingContext, enable_python_dispatcher


@dataclasses.dataclass(frozen=True)
class DynamoCapture:
    """The result of :func:`from_dynamo`.

    ``graph_module`` is the captured graph; its :func:`~qpass.ir.origins.origins` say what its constants stand for.
    ``bindings`` maps the name of each constant that is a tensor of the user's model to the position of its argument in
    Dynamo's call. ``inputs`` holds the positions that feed the placeholders, in placeholder order. ``arguments`` are
    those of this first call, and ``sources`` Dynamo's names for them. ``gathered`` holds the positions of weights that
    FSDP gathers anew, in the same memory and with the same version: nothing about them tells that their values changed.
    """

    graph_module: fx.GraphModule
    bindings: dict[str, int]
    inputs: tuple[int, ...]
    arguments: tuple[Any, ...]
    sources: tuple[Any, ...]
    gathered: frozenset[int]


def from_dynamo(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> DynamoCapture:
    """Retrace Dynamo's ``gm`` to pre-dispatch ATen and turn the user's weights into constants.

    Must run inside a Dynamo backend, on the arguments the backend was given. Dynamic dimensions stay the symbols of
    Dynamo's shape environment, sub-graphs of ``cond``, ``while_loop`` and ``scan`` are retraced with the rest, dead
    code goes, and ``meta`` keeps ``stack_trace``, ``nn_module_stack`` and ``from_node`` and gains ``val``. The
    constants *are* the user's tensors, not copies. A weight that the graph itself writes to (a running mean) stays a
    placeholder: it is state, not a constant; so does one that shares memory with what the graph writes to.
    """
    example_inputs = real_arguments(example_inputs)
    given = gm.graph.find_nodes(op="placeholder")
    traced = _retrace(gm, _fake_inputs(given, example_inputs))
    traced.graph.eliminate_dead_code()
    correct_vals(traced)
    for region in regions(traced):
        for node in region.graph.find_nodes(op="get_attr"):
            if isinstance(value := get_constant(region, node.target), Tensor):
                origins(region)[str(node.target)] = value
    placeholders = traced.graph.find_nodes(op="placeholder")
    bindings: dict[str, int] = {}
    inputs = []
    state = {
        _memory(value) for value, node in zip(example_inputs, placeholders, strict=True)
        if isinstance(value, Tensor) and _is_written(node)
    }  # fmt: skip
    for index, (argument, node) in enumerate(zip(given, placeholders, strict=True)):
        value = example_inputs[index]
        if not _is_weight(value) or _memory(value) in state:
            inputs.append(index)
        elif not node.users:
            traced.graph.erase_node(node)
        else:
            name = free_name(traced, _module_path(argument))
            _to_constant(traced, node, name, value)
            origins(traced)[name] = bindings[name] = index
    traced.recompile()
    sources = tuple(getattr(argument, "_dynamo_source", None) for argument in given)
    gathered = frozenset(index for index in bindings.values() if _is_gathered(sources[index]))
    return DynamoCapture(traced, bindings, tuple(inputs), tuple(example_inputs), sources, gathered)


def real_arguments(example_inputs: Sequence[Any]) -> list[Any]:
    """The arguments of a backend, with the user's tensors in the place of fake ones.

    Dynamo's optimizer for DDP compiles a graph in parts and gives each part fake tensors. What one part computes for
    another stays fake, because that tensor does not exist yet.
    """
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else None
    if context is None or mode is None or not any(isinstance(value, FakeTensor) for value in example_inputs):
        return list(example_inputs)
    memo = mode.fake_tensor_converter._get_memo
    behind = {id(fake): real for real in context.tensor_to_context if (fake := memo(real)) is not None}
    return [behind.get(id(value), value) for value in example_inputs]


def _is_gathered(source: Any) -> bool:
    """Whether Dynamo found a tensor in a module of FSDP, whose parameters hold their values only while it runs."""
    return source is not None and source.guard_source.is_fsdp_module()


def _fake_inputs(placeholders: Iterable[fx.Node], example_inputs: Sequence[Any]) -> list[Any]:
    """Fake arguments in a new mode that shares Dynamo's symbols.

    New, because Dynamo's own fakes may have been changed by its trace (``x.t_()``), and those of the backend's mode
    must reach AOTAutograd untouched.
    """
    context = TracingContext.get()
    shape_env = context.fake_mode.shape_env if context.fake_mode is not None else None
    mode = FakeTensorMode(shape_env=shape_env, allow_non_fake_inputs=True)

    def fake(placeholder: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        symbolic = context.tensor_to_context.get(value)
        if symbolic is None:
            return mode.from_tensor(value, static_shapes=True, source=getattr(placeholder, "_dynamo_source", None))
        return mode.from_tensor(value, symbolic_context=symbolic, source=symbolic.tensor_source)

    return [fake(placeholder, value) for placeholder, value in zip(placeholders, example_inputs, strict=True)]


def _retrace(gm: fx.GraphModule, inputs: list[Any]) -> fx.GraphModule:
    """``gm`` as pre-dispatch ATen. ``tracing_mode="real"`` takes the inputs, which are fake already, as they are."""
    mode = next((value.fake_mode for value in inputs if isinstance(value, FakeTensor)), None)

    def forward(*arguments: Any) -> Any:
        return fx.Interpreter(gm).run(*arguments)

    trace = make_fx(forward, tracing_mode="real", pre_dispatch=True, _allow_non_fake_inputs=True)
    with mode or contextlib.nullcontext(), enable_python_dispatcher(), fx.traceback.preserve_node_meta():
        return trace(*inputs)


def _is_weight(value: Any) -> bool:
    """Whether Dynamo met the tensor as an attribute of a module, and so marked it; a Parameter counts anywhere."""
    return isinstance(value, Tensor) and (
        isinstance(value, torch.nn.Parameter) or getattr(value, "_dynamo_static_input_type", None) is not None
    )


def _memory(value: Tensor) -> int:
    """The identity of a tensor's storage, or of the tensor where it has no storage."""
    return value.untyped_storage()._cdata if value.layout == torch.strided else id(value)


def _is_written(placeholder: fx.Node) -> bool:
    """Whether the graph writes to the placeholder, directly or through a view."""
    pending, seen = [placeholder], {placeholder}
    while pending:
        node = pending.pop()
        for user in node.users:
            writes, aliases = _effects(user, node)
            if writes:
                return True
            if aliases and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _effects(user: fx.Node, node: fx.Node) -> tuple[bool, bool]:
    """Whether ``user`` writes to its operand ``node``, and whether its result may alias it."""
    if not isinstance(user.target, torch_private.OpOverload):
        return False, user.op == "call_function" and not isinstance(user.target, torch_private.HigherOrderOperator)
    aliases = False
    for argument, value in arguments(user):
        held = value if isinstance(value, (list, tuple)) else (value,)
        aliases |= argument.alias_info is not None and any(item is node for item in held)
    return node in written_inputs(user), aliases


def _module_path(argument: fx.Node) -> str:
    """``L['self']._modules['fc']._parameters['weight']`` -> ``fc.weight``; Dynamo's own name where it has no path."""
    source = getattr(argument, "_dynamo_source", None)
    path = clean_path(source.name) if source is not None else ""
    words = path.split(".")
    return path if all(word.isidentifier() or word.isdigit() for word in words) else str(argument.target)


def _to_constant(gm: fx.GraphModule, placeholder: fx.Node, name: str, value: Tensor) -> None:
    set_constant(gm, name, value)
    with gm.graph.inserting_before(placeholder):
        constant = gm.graph.create_node("get_attr", name)
    constant.meta = dict(placeholder.meta)
    placeholder.replace_all_uses_with(constant)
    gm.graph.erase_node(placeholder)
