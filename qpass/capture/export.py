"""Capture by torch.export: an FX graph of pre-dispatch ATen with parameters and buffers as ``get_attr``.

The batch dimension is dynamic by default, and that is checked. ``torch.export`` assumes that a dynamic size is at least
2, so a branch on ``x.shape[0] == 1`` would vanish silently. So the model is exported twice: with a batch of at least 2,
and with a batch of 1. Where the two graphs are the same operators in the same order, the first holds for every batch.
Otherwise an assertion refuses size 1.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection, export

from qpass import torch_private
from qpass.capture.errors import explain, refuse_autocast, refuse_graph, refuse_model
from qpass.capture.graph_comparison import same_operators
from qpass.capture.inputs import example_of, fresh_tensors, is_unpacked, resize_batch, tensors_of
from qpass.capture.undone_writes import writes_undone
from qpass.errors import CaptureError, InputError
from qpass.ir.attributes import owner_of
from qpass.ir.guard import guard_inputs, symbol_of
from qpass.ir.module import Draft, copy_graph_module
from qpass.ir.plain_form import normalize
from qpass.ir.record import graph_record

CAPTURE_KEY = "qpass_capture"

# torch.export changes global state while it traces; one trace at a time in the whole process.
TRACING = threading.RLock()


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    amend: Callable[[fx.GraphModule], None] | None = None,
    trains: bool = False,
) -> fx.GraphModule:
    """The normalised graph of ``model``, at stage "captured"; called like the model, it returns the same, bit for bit.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram``, or a ``GraphModule`` (of ATen operators: taken as it is; of
            anything else: exported). It is not edited, and its parameters and buffers are shared, not copied.
        example_inputs: a tuple of positional inputs, one tensor, or a dict of keyword inputs; needed for an export.
        kwargs: keyword inputs beside positional ones.
        dynamic_shapes: as ``torch.export.export`` takes it. By default dimension 0 of every tensor is dynamic where
            the model allows it, and static, with a note that says why, where it does not.
        amend: called with the graph before it is normalised.
        trains: the graph keeps gradients from passing where the model does: ``detach``, ``torch.no_grad``.

    Returns:
        A graph module in evaluation mode. ``meta["qpass_capture"]["notes"]`` lists what should be reported. The graph
        asserts the sizes, dtypes and Python values that it holds for (see :mod:`qpass.ir.guard`).

    Raises:
        CaptureError: torch cannot export the model (``where`` is the user's line); the model lies on the meta device,
            computes with integers alone, or is in training mode.
        InputError: an argument has the wrong type, or the example inputs are missing.
    """
    refuse_model(model)
    refuse_autocast()
    with TRACING:
        try:
            traced = _trace(model, example_inputs, kwargs, dynamic_shapes, trains)
        except CaptureError as error:
            if is_unpacked(example_inputs):
                what = f"example_inputs are the {len(example_inputs)} rows of one tensor, which the model does not take"
                raise InputError(what, hint="pass the tensor as one input, (x,) and not tuple(x)") from error
            raise
        if not traced.guarded:
            guard_inputs(traced.gm, traced.ranges, traced.excluded)
        if amend is not None:
            amend(traced.gm)
        gm = normalize(traced.gm, _module_types(model), trains)
    if not isinstance(model, ExportedProgram):
        type(gm).__name__ = type(model).__name__  # a GraphModule has a class of its own
    refuse_graph(gm)
    if any(issubclass(kind, nn.TransformerEncoderLayer) for kind in _module_types(model).values()):
        traced.notes.append(
            "in evaluation without gradients torch runs nn.TransformerEncoderLayer by a fused kernel, which no graph "
            "holds: results agree but for rounding and for padded places"
        )
    gm.meta = {CAPTURE_KEY: {"notes": traced.notes}}
    graph_record(gm).stage = "captured"
    return gm.eval()


class FirstBatch(nn.Module):
    """A model that is captured at its first call, on the inputs of that call.

    Args:
        model: the model; it is held without being registered, so nothing done to this module reaches it.
        build: ``build(model, args, kwargs)`` makes the graph module that serves every call.
    """

    def __init__(self, model: nn.Module, build: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], fx.GraphModule]):
        super().__init__()
        self._pending: tuple[nn.Module, Callable[..., fx.GraphModule]] | None = (model, build)
        self.built: fx.GraphModule | None = None

    @property
    def captured(self) -> fx.GraphModule:
        """The built graph module.

        Raises:
            CaptureError: no batch was seen yet.
        """
        if self.built is None:
            raise CaptureError(
                "the model was given without example inputs and has not seen a batch yet, so there is no graph",
                where=type(self._pending[0]).__name__ if self._pending else None,
                hint="call it on a batch first, or pass example_inputs",
            )
        return self.built

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.built is None:
            torch.compiler.disable(self._build)(args, kwargs)  # as a decorator it would import Dynamo with this file
        return self.captured(*args, **kwargs)

    def _build(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with TRACING:
            if self._pending is not None:  # another thread may have been first
                model, build = self._pending
                self.built = build(model, args, kwargs)
                self._pending = None


# ---- tracing

_GUARDS = "_guards_fn"  # the sub-module of input checks that ExportedProgram.module() calls


@dataclass
class _Traced:
    """A graph of our own, and what is known about the inputs it holds for."""

    gm: fx.GraphModule
    ranges: Mapping[Any, Any] = field(default_factory=dict)
    excluded: list[tuple[Any, int]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    guarded: bool = False


def _trace(
    model: nn.Module | ExportedProgram, example_inputs: Any, kwargs: Any, dynamic_shapes: Any, trains: bool
) -> _Traced:
    if isinstance(model, ExportedProgram):
        traced = _from_program(model)
        traced.gm = copy_graph_module(traced.gm, Draft)  # its regions are the program's own
        return traced
    if isinstance(model, fx.GraphModule) and _is_aten(model):
        gm = copy_graph_module(model, Draft)
        for guards in [node for node in gm.graph.nodes if node.target == _GUARDS]:
            gm.graph.erase_node(guards)
        ranges = getattr(model, "range_constraints", None) or {}  # ExportedProgram.module() carries them
        return _Traced(_stateless_constants(gm), ranges, guarded=CAPTURE_KEY in model.meta)
    args, keywords = example_of(example_inputs, kwargs, model)
    if not isinstance(dynamic_shapes, ShapesCollection):  # which knows tensors by identity
        args, keywords = fresh_tensors((args, keywords))
    if dynamic_shapes is not None:
        return _from_program(export_model(model, args, keywords, dynamic_shapes, trains))
    return _with_dynamic_batch(model, args, keywords, trains)


def _with_dynamic_batch(model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], trains: bool) -> _Traced:
    batch = next((x.shape[0] for x in tensors_of((args, keywords)) if x.dim()), None)
    if batch is None:
        return _from_program(export_model(model, args, keywords, None, trains))
    if batch == 0:
        raise InputError(
            "the example inputs are an empty batch, which shows no shape but its own",
            hint="pass a batch of 2 or more; the prepared model takes an empty one then",
        )
    several, more = resize_batch((args, keywords), batch, 2) if batch == 1 else fresh_tensors((args, keywords))
    try:
        program = export_model(model, several, more, batch_shapes((several, more)), trains)
    except CaptureError as error:
        traced = _from_program(export_model(model, args, keywords, None, trains))
        traced.notes.append(f"the batch size is fixed to {batch}: {error.what}")
        return traced
    symbol = _batch_symbol(program)
    if symbol is None and batch != 1:
        traced = _from_program(program)
        traced.notes.append(f"the batch size is fixed to {batch}: the model's code holds for no other")
        return traced
    one, reason = _export_one(model, *resize_batch((args, keywords), batch, 1), trains)
    if symbol is not None and one is not None and same_operators(program.graph_module, one.graph_module):
        return _from_program(program)
    if batch == 1:
        traced = _from_program(one or export_model(model, args, keywords, None, trains))
        traced.notes.append("the batch size is fixed to 1: the model takes another path for other sizes")
        return traced
    traced = _from_program(program)
    traced.excluded.append((symbol, 1))
    traced.notes.append(f"a batch of size 1 is refused: {reason or 'the model takes another path for it'}")
    return traced


def _from_program(program: ExportedProgram) -> _Traced:
    return _Traced(_stateless_constants(program.module(check_guards=False)), program.range_constraints)


def _stateless_constants(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm``, marked so that tensors that are plain attributes stay out of ``state_dict`` when they become buffers."""
    for node in gm.graph.find_nodes(op="get_attr"):
        owner, leaf = owner_of(gm, node.target)
        if isinstance(getattr(owner, leaf), Tensor) and leaf not in owner._parameters and leaf not in owner._buffers:
            owner._non_persistent_buffers_set.add(leaf)
    return gm


def export_model(
    model: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], dynamic_shapes: Any, gradients: bool = False
) -> ExportedProgram:
    """``torch.export.export``, with or without gradients, without traces in the model, with errors that name a line."""
    try:
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), _quiet(), writes_undone():
            return export(model, args, keywords, dynamic_shapes=dynamic_shapes, strict=False)
    except Exception as error:
        raise explain(error, model) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch's log of an operator that fails on fake tensors. The error says the same, and a probe may fail."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = disabled


def _export_one(model: nn.Module, args: Any, keywords: Any, trains: bool) -> tuple[ExportedProgram | None, str]:
    """The export at a batch of 1, or None and the reason why there is none."""
    try:
        return export_model(model, args, keywords, None, trains), ""
    except CaptureError as error:
        return None, error.what


def batch_shapes(inputs: tuple[Any, Any]) -> ShapesCollection:
    """``dynamic_shapes`` that leave dimension 0 of every tensor open."""
    shapes = ShapesCollection()
    for x in tensors_of(inputs):
        if x.dim():
            shapes[x] = {0: Dim.AUTO}
    return shapes


def _batch_symbol(program: ExportedProgram) -> Any:
    """The symbol of dimension 0 of the first tensor input that has one; None when it became static."""
    inputs = set(program.graph_signature.user_inputs)
    for node in program.graph.find_nodes(op="placeholder"):
        val = node.meta.get("val")
        if node.name in inputs and isinstance(val, Tensor) and val.dim():
            return symbol_of(val.shape[0])
    return None


# ---- graph modules


def _is_aten(gm: fx.GraphModule) -> bool:
    """Whether the graph is ATen with values already, as export and ``make_fx`` write it."""
    for node in gm.graph.nodes:
        if node.op == "placeholder" and "val" not in node.meta:
            return False
        if node.op == "call_method" or (node.op == "call_module" and node.target != _GUARDS):
            return False
        if node.op == "call_function" and not isinstance(node.target, torch_private.OperatorBase):
            module, name = getattr(node.target, "__module__", ""), getattr(node.target, "__name__", "")
            if module not in ("_operator", "math") and not (module == "torch" and name.startswith("sym_")):
                return False
    return True


def _module_types(model: nn.Module | ExportedProgram) -> dict[str, type]:
    return {path: type(module) for path, module in model.named_modules()} if isinstance(model, nn.Module) else {}
