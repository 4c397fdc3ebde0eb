"""The snapshot of a program: a graph module, an exported program, a file, or a compiled model.

Regions (the bodies of ``cond``, ``while_loop``, ``torch.no_grad`` ...) stand in the same list as the graph around them,
each node with the name of its region. Lifted parameters of an ``ExportedProgram`` are shown as the ``get_attr`` that
``ExportedProgram.module()`` makes of them, so both forms of a program have one snapshot.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

from qpass import torch_private
from qpass.backend.compilations import compiled_graphs, program_of
from qpass.capture.export import FirstBatch
from qpass.errors import InputError
from qpass.inspect.saved import kept_maker, kept_record, kept_stage, open_program
from qpass.inspect.values.nodes import INPUT, Keyword, NodeView, Snapshot
from qpass.ir.observer import Observer
from qpass.ir.record import GRAPH_KEY
from qpass.ir.source import module_path
from qpass.ir.text import target_name

_QDQ = frozenset({"quantized_decomposed"})
_AFFINE = ("quantize_affine", "dequantize_affine", "choose_qparams_affine")  # torchao's names for the same


def snapshot(program: Any) -> Snapshot:
    """``program`` as it is now: a GraphModule, an ExportedProgram, the path of a saved one, a model prepared without
    inputs that saw a batch, or a model compiled with ``backend="qpass"`` that ran.

    Raises:
        InputError: it is none of these, or the file holds no program.
    """
    if isinstance(program, Snapshot):
        return program
    if isinstance(program, (str, os.PathLike)):
        found = snapshot(open_program(program))
        found.label = Path(program).name
        return found
    if isinstance(program, FirstBatch):
        program = program.captured
    model = program_of(program)
    graphs = compiled_graphs(model) if isinstance(model, torch.nn.Module) else [program]
    if not graphs and isinstance(program, fx.GraphModule):
        graphs = [program]  # compiled in place, and not run yet
    reader = _Reader()
    stages = []
    for graph in graphs:
        if isinstance(graph, ExportedProgram):
            reader.read(graph.graph_module, "", lifted(graph))
            stages.append(kept_stage(graph))
        elif isinstance(graph, fx.GraphModule):
            reader.read(graph, "", {})
            stages.append(getattr(graph.meta.get(GRAPH_KEY), "stage", ""))
        else:
            raise InputError(
                f"a graph is needed, and this is {type(graph).__name__}",
                hint="pass a GraphModule, an ExportedProgram, the path of a saved one, or a compiled model that ran",
            )
    return Snapshot(reader.nodes, ", ".join(dict.fromkeys(filter(None, stages))), frozenset(reader.graph_ids))


def lifted(program: ExportedProgram) -> dict[str, tuple[str, Any]]:
    """Placeholder name -> (dotted name, tensor), for the parameters, buffers and constants of ``program``."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants
    }  # fmt: skip
    return {name: (path, program.state_dict.get(path, program.constants.get(path))) for name, path in names.items()}


class _Reader:
    """Turns nodes into views, region by region."""

    def __init__(self) -> None:
        self.nodes: list[NodeView] = []
        self.graph_ids: set[int] = set()

    def read(self, gm: fx.GraphModule, region: str, constants: dict[str, tuple[str, Any]]) -> None:
        self.graph_ids.add(id(gm.graph))
        index: dict[fx.Node, int] = {}
        for node in gm.graph.nodes:
            view, meta = NodeView(), node.meta
            view.region, view.name, view.op, view.target = region, node.name, node.op, node.target
            view.val, view.stack = meta.get("val"), meta.get("stack_trace") or ""
            view.record, view.origin, view.place = kept_record(node), meta.get("from_node"), None
            view.module, view.is_transparent = module_path(node), False
            view.made_by = kept_maker(node)
            if node.op == "get_attr" or (node.op == "placeholder" and node.name in constants):
                self._constant(view, gm, constants)
            elif node.op == "call_module":
                module = gm.get_submodule(node.target)
                view.operator = view.short = type(module).__name__
                view.is_transparent = isinstance(module, Observer)
            else:
                view.operator = str(node.target) if node.op == "call_function" else node.op
                view.short = target_name(node) if node.op == "call_function" else node.op
                if isinstance(node.target, torch_private.OpOverload):
                    view.is_transparent = node.target.namespace in _QDQ or node.target._opname in _AFFINE
                elif node.op == "call_function":
                    view.operator = f"{getattr(node.target, '__module__', '')}.{view.short}".lstrip("._")
            inputs: list[int] = []

            def note(source: fx.Node, inputs: list[int] = inputs) -> Any:
                inputs.append(index[source])
                return INPUT

            args, kwargs = fx.node.map_arg((node.args, node.kwargs), note)
            view.template = (*hashable(args), *hashable(kwargs)) if node.op != "placeholder" else ()
            view.inputs = tuple(inputs)
            if view.short == "getitem" and inputs and self.nodes[inputs[0]].is_transparent:
                view.is_transparent = True
            index[node] = view.index = len(self.nodes)
            self.nodes.append(view)

    def _constant(self, view: NodeView, gm: fx.GraphModule, constants: dict[str, tuple[str, Any]]) -> None:
        name, value = constants[view.name] if view.op == "placeholder" else (view.target, _attribute(gm, view.target))
        view.op, view.target, view.operator, view.short = "get_attr", name, name, name
        if isinstance(value, fx.GraphModule):
            self.read(value, f"{view.region}.{name}".lstrip("."), {})
        elif isinstance(value, Tensor):
            view.place = place(value)
            view.val = value.detach().to("meta") if view.val is None and value.layout == torch.strided else view.val


def place(value: Tensor) -> tuple[Any, int]:
    """The identity of a constant's memory, and its bytes. A packed tensor counts one byte for each value."""
    plain = value.layout == torch.strided and value.device.type != "meta"
    size = value.numel() * (value.element_size() if value.layout == torch.strided else 1)
    return (value.data_ptr() or id(value) if plain else id(value)), size


def hashable(argument: Any) -> Any:
    """Nested arguments as nested tuples."""
    if isinstance(argument, (tuple, list)):
        return tuple([hashable(item) for item in argument])
    if isinstance(argument, dict):
        return tuple([Keyword(str(key), hashable(item)) for key, item in argument.items()])
    if isinstance(argument, slice):
        return "slice", hashable(argument.start), hashable(argument.stop), hashable(argument.step)
    return argument if type(argument).__hash__ is not None else repr(argument)


def _attribute(gm: torch.nn.Module, name: str) -> Any:
    found: Any = gm
    for part in name.split("."):
        found = getattr(found, part, None)
    return found
