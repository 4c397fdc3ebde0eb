"""A lowered graph, compiled by Inductor and kept in step with its weights.

Packed weights become constants of the compiled code (:mod:`qpass.backend.hidden_kernels`). All other tensors become
arguments, because Inductor may print the value of a small constant into its code. No later change of a weight could
reach it there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qpass import torch_private
from qpass.backend.derivation import Derivation, Key
from qpass.backend.hidden_kernels import hide
from qpass.backend.live_constants import LiveConstants, pick
from qpass.capture.dynamo import DynamoCapture
from qpass.capture.fake_dtypes import decompose_calls
from qpass.ir.attributes import get_constant
from qpass.ir.fake import fake_mode_of
from qpass.ir.module import copy_graph_module
from qpass.ir.pipeline import is_recorded
from qpass.ir.regions import operands_of, regions
from qpass.torch_private import FakeTensorMode, TracingContext

if TYPE_CHECKING:
    from qpass.torch_private import CustomGraphPass

UNCACHED = {"fx_graph_cache": False, "fx_graph_remote_cache": False}

COMPUTED_ONCE = {"realize_opcount_threshold": 10}
"""A value that two loops read, such as a row for its range and for its codes, is stored if it takes so many operations.
Inductor would compute a gelu of 25 operations twice."""


def compile_lowered(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    capture: DynamoCapture | None = None,
    decompositions: Mapping[Any, Callable[..., Any]],
    post_grad: Sequence[CustomGraphPass] = (),
    config_patches: Mapping[str, Any] | None = None,
    inner: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile ``gm``, a lowered graph for inference, and return what Dynamo is to call; ``gm`` is not changed.

    ``example_inputs`` are the arguments that Dynamo gave the backend and ``capture`` says how they became ``gm``.
    Without it, every argument feeds a placeholder and every constant is the tensor that ``gm`` holds.
    ``decompositions`` are added to Inductor's own and serve the q/dq that are left. ``post_grad`` passes run on
    Inductor's post-grad graph, after those that the user configured. ``config_patches`` are options for Inductor, for
    this graph alone: ``torch._inductor.config`` is left as it is. ``inner`` stands in for ``compile_fx_inner``.
    """
    from qpass.torch_private import compile_fx, compile_fx_inner, select_decomp_table

    lifted = copy_graph_module(gm)
    derivation = Derivation(lifted)
    decompose_calls(lifted)
    packed = hide(lifted)
    keys = _lift(lifted, derivation)
    lifted = copy_graph_module(lifted)  # leaves the constants behind
    given: Sequence[Any] = capture.arguments if capture is not None else example_inputs
    constants = LiveConstants(derivation, given, capture.gathered if capture is not None else ())
    positions = list(capture.inputs if capture is not None else range(len(example_inputs)))
    positions += [number for kind, number in keys if kind == "argument"]
    held = [constants.hold(key) for key in keys if key[0] != "argument"]
    sources = capture.sources if capture is not None else [None] * len(example_inputs)
    _keep_sources(lifted, [*(sources[position] for position in positions), *(None for _ in held)])
    mode = _backend_mode(lifted)
    with torch.no_grad(), _context(mode):
        call: Any = compile_fx(
            lifted,
            [
                *(example_inputs[position] for position in positions),
                *(mode.from_tensor(tensor, static_shapes=True) for tensor in held),
            ],
            inner_compile=inner or compile_fx_inner,
            config_patches={**COMPUTED_ONCE, **(config_patches or {}), **_patches(packed, post_grad)},
            decompositions={**select_decomp_table(), **decompositions},
        )
    inputs = pick(positions)

    def lowered(*arguments: Any) -> Any:
        held = constants.enter(arguments)
        try:
            return call(*inputs(arguments), *held)
        finally:
            constants.leave()

    return lowered


def compile_plain(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    post_grad: Sequence[CustomGraphPass],
    config_patches: Mapping[str, Any],
    inner: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph as Dynamo gave it, for inference or training; the rest is as in `compile_lowered`."""
    from qpass.torch_private import compile_fx, compile_fx_inner

    patches = {**config_patches, **_after(post_grad)}
    compiled: Any = compile_fx(gm, list(example_inputs), inner or compile_fx_inner, config_patches=patches)
    return compiled


def _lift(gm: fx.GraphModule, derivation: Derivation) -> list[Key]:
    """Turn the tensors that the graph and its regions read into inputs, each once. Returns their keys in input order.

    Dynamo's arguments come first. Regions get them as operands: ``cond(p, f, g, (x,)) -> cond(p, f, g, (x, weight))``,
    all of them in every region.
    """
    found: dict[Key, None] = {}
    inside: dict[Key, None] = {}
    for region in regions(gm):
        for _, key in _reads(region, derivation):
            found[key] = None
            if region is not gm:
                inside[key] = None
    ordered = sorted(found, key=lambda key: key[0] != "argument")
    for region in list(regions(gm)):
        _take_inputs(region, _reads(region, derivation), ordered if region is gm else list(inside), list(inside))
    return ordered


def _reads(region: fx.GraphModule, derivation: Derivation) -> list[tuple[fx.Node, Key]]:
    return [
        (node, derivation.key(region, str(node.target)))
        for node in region.graph.find_nodes(op="get_attr")
        if isinstance(get_constant(region, node.target), Tensor)
    ]


def _take_inputs(
    region: fx.GraphModule, reads: list[tuple[fx.Node, Key]], keys: list[Key], passed_on: list[Key]
) -> None:
    graph = region.graph
    values = {key: node.meta.get("val") for node, key in reads}
    placeholders = graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for placeholder in placeholders:  # what reads constants alone may stand before an input
        first.prepend(placeholder)
    inputs: dict[Key, fx.Node] = {}
    with graph.inserting_after(placeholders[-1]) if placeholders else graph.inserting_before(next(iter(graph.nodes))):
        for key in reversed(keys):  # each is inserted right after the last old placeholder
            inputs[key] = graph.placeholder(f"constant_{len(inputs)}")
            inputs[key].meta["val"] = values.get(key)
    for node, key in reads:
        node.replace_all_uses_with(inputs[key])
        graph.erase_node(node)
    extra = tuple(inputs[key] for key in passed_on)
    for call in graph.nodes:
        operands = operands_of(region, call) if extra else None
        if operands is not None and operands.bodies:
            call.args = operands.args((*operands.values, *extra))
    region.recompile()


def _keep_sources(gm: fx.GraphModule, sources: Sequence[Any]) -> None:
    """Mark the graph as Dynamo's, so that AOTAutograd guards on inputs that overlap as it does for Dynamo's own."""
    context = TracingContext.try_get()
    if context is None or all(source is None for source in sources):
        return
    gm.meta["dynamo_compile_id"] = torch_private.CompileContext.current_compile_id()
    gm._param_name_to_source = {}  # type: ignore[assignment]
    for node, source in zip(gm.graph.find_nodes(op="placeholder"), sources, strict=True):
        node._dynamo_source = source


def _backend_mode(gm: fx.GraphModule) -> FakeTensorMode:
    context = TracingContext.try_get()
    mode = context.fake_mode if context is not None else fake_mode_of(gm.graph)
    return mode if mode is not None else FakeTensorMode()


def _context(mode: FakeTensorMode) -> contextlib.AbstractContextManager[Any]:
    if TracingContext.try_get() is not None:
        return contextlib.nullcontext()
    return torch_private.tracing(TracingContext(mode))


def _patches(packed: Sequence[Tensor], post_grad: Sequence[CustomGraphPass]) -> dict[str, Any]:
    patches = {"freezing": False, **_after(post_grad)}  # freezing would take the arguments for constants
    if packed:  # the cache's key does not hold the constants: another model's weights would be served
        patches |= UNCACHED
    return patches


def _after(post_grad: Sequence[CustomGraphPass]) -> dict[str, Any]:
    if not post_grad:
        return {}
    configured = torch_private.inductor_config.post_grad_custom_post_pass or ()
    first = configured if isinstance(configured, (list, tuple)) else (configured,)
    # Of a graph that the cache serves there would be nothing to see.
    return {"post_grad_custom_post_pass": [*first, *post_grad], **(UNCACHED if is_recorded() else {})}
