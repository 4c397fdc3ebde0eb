"""Models in files: ``save`` writes a ``.pt2`` that any torch can load, ``load`` brings back the decisions as well."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import Dim, ExportedProgram
from torch.fx.traceback import NodeSource, NodeSourceAction

from qpass import torch_private
from qpass.capture.export import TRACING, capture
from qpass.errors import InputError
from qpass.inspect.matching.match import match
from qpass.inspect.operations import PASSES
from qpass.inspect.saved import CUSTOM, EXTRA, FORMAT, KEY, MADE_BY, as_kept, kept_record, open_program
from qpass.inspect.snapshot import snapshot
from qpass.ir.exporting import QUIET
from qpass.ir.record import GRAPH_KEY, GraphRecord, graph_record, set_record
from qpass.islands.qparam_state import keep_qparams


def save(model: fx.GraphModule | ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Write a captured or quantized graph, or an exported program, as a ``.pt2``.

    The file is an ordinary one of ``torch.export``; decisions, stage, target and the number of the format travel beside
    the program. Where q/dq operators are not registered, a process imports ``qpass`` before it loads the file.

    Raises:
        InputError: the model is no graph, or at a stage that no file can hold: observers compute with Python, and
            packed weights are of one machine.
    """
    if isinstance(model, ExportedProgram):
        torch.export.save(model, os.fspath(path))
        return
    if not isinstance(model, fx.GraphModule):
        raise InputError(f"save takes a graph, not {type(model).__name__}", hint="call qpass.prepare and convert first")
    record = graph_record(model)
    instead = {
        "prepared": "save the quantized graph that qpass.convert makes of it",
        "lowered": "save the quantized graph, and lower or compile it where it is loaded",
    }
    if record.stage in instead:
        raise InputError(f"a {record.stage} graph cannot be saved", hint=instead[record.stage])
    program = _exported(model)
    before, after = snapshot(model), snapshot(program)
    nodes = {node.name: node for node in program.graph.nodes}
    for left, right in match(before, after).items():
        if after.nodes[right].region:
            continue
        view, node = before.nodes[left], nodes[after.nodes[right].name]
        told: dict[str, Any] = {KEY: as_kept(view.record)} if view.record is not None else {}
        told |= {MADE_BY: view.made_by} if view.made_by in PASSES.union(record.passes) else {}
        node.meta[CUSTOM] = {**node.meta.get(CUSTOM, {}), **told}
    state = {
        "stage": record.stage, "target": record.target, "float_bytes": record.float_bytes, "notes": record.notes,
        "weight_bytes": record.weight_bytes, "weight_bytes_kept": record.weight_bytes_kept,
    }  # fmt: skip
    torch.export.save(program, os.fspath(path), extra_files={EXTRA: json.dumps({"format": FORMAT, **state})})


def load(path: str | os.PathLike[str]) -> fx.GraphModule:
    """The graph in a ``.pt2`` file, at the stage it was saved at: ready for ``report``, ``diff``, ``lower`` and
    ``torch.compile(..., backend="qpass")``; a program that qpass did not save is at stage "captured".

    torch executes code while it opens such a file: load only files whose origin you trust.

    Raises:
        InputError: there is no such file, it holds no exported program, or a newer qpass wrote it.
    """
    program = open_program(path)
    state: dict[str, Any] = {**program.graph_module.meta.get(EXTRA, {})}
    state.pop("format", None)
    gm = capture(program)
    if state:
        gm.meta[GRAPH_KEY] = GraphRecord(**state)
        if graph_record(gm).stage == "quantized":
            keep_qparams(gm)
    made: dict[str, None] = {}
    for node in gm.graph.nodes:
        record = kept_record(node)
        if record is not None:
            set_record(node, record)
        made_by = node.meta.get(CUSTOM, {}).get(MADE_BY)
        if made_by:
            node.meta["from_node"] = [NodeSource(node, str(made_by), NodeSourceAction.CREATE)]
            made.setdefault(str(made_by))
    if made:
        graph_record(gm).passes = tuple(made)
    return gm


def _exported(gm: fx.GraphModule) -> ExportedProgram:
    """``gm`` as a program; its symbolic sizes stay dynamic."""
    inputs = gm.graph.find_nodes(op="placeholder")
    values = [node.meta.get("val") for node in inputs]
    for node, value in zip(inputs, values, strict=True):
        if "val" not in node.meta or not isinstance(value, Tensor | int | float | bool | str | None):
            raise InputError(
                f"a graph whose input {node.name!r} is a {type(value).__name__} cannot be saved",
                hint="give the model tensors, numbers, strings or None there, or make the value an attribute of it",
            )
    example = tuple(_example(value) for value in values)
    dynamic = [_dynamic(value) for value in values]
    args, kwargs = _nested(gm, list(example))
    shapes = _nested(gm, dynamic)
    named_shapes = None if not any(dynamic) else (tuple(shapes[0]) if not kwargs else _by_name(gm, shapes))
    token = QUIET.set(True)
    try:
        with TRACING, torch.no_grad():
            return torch.export.export(gm, args, kwargs, dynamic_shapes=named_shapes, strict=False)
    finally:
        QUIET.reset(token)


def _example(value: Any) -> Any:
    """An input of that form; a Python value is itself, since the graph holds for no other."""
    if not isinstance(value, Tensor):
        return value
    return torch.zeros([_number(size) for size in value.shape], dtype=value.dtype, device=value.device)


def _dynamic(value: Any) -> dict[int, Any] | None:
    if not isinstance(value, Tensor):
        return None
    return {dim: Dim.AUTO for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}


def _nested(gm: fx.GraphModule, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One value for each input as the module is called with: (args, kwargs)."""
    info = getattr(gm.graph._codegen, "pytree_info", None)
    if info is None or info.in_spec is None:
        return tuple(leaves), {}
    args, kwargs = torch_private.tree_unflatten(leaves, info.in_spec)
    return tuple(args), dict(kwargs)


def _by_name(gm: fx.GraphModule, shapes: tuple[tuple[Any, ...], dict[str, Any]]) -> dict[str, Any]:
    names = gm.graph._codegen.pytree_info.orig_args  # type: ignore[attr-defined]
    return {**dict(zip(names, shapes[0], strict=False)), **shapes[1]}


def _number(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
