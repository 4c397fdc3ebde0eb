"""Editing FX graphs: nodes that keep their provenance, constants by dotted name, copies that share weights."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.traceback import NodeSource, NodeSourceAction

from qpass.ir.fake import fake_call, fake_constant, fake_mode_of
from qpass.ir.module import GraphModule
from qpass.ir.origins import Derived, derived_constants, is_known

INHERITED = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn")


class Editor:
    """Inserts nodes into one graph and gives each its ``meta["val"]``, stack trace, module stack and ``from_node``.

    ``val`` is computed by running the operation on the fake values of its inputs, so shapes stay symbolic; a node
    whose inputs have no fake value gets none.
    """

    def __init__(self, gm: fx.GraphModule, pass_name: str = "") -> None:
        self.gm = gm
        self.graph = gm.graph
        self.pass_name = pass_name
        self._constants: dict[tuple[Any, ...], Any] = {}
        self._numbers: Counter[str] = Counter()
        self._derived: dict[Hashable, str] = {}

    def call(
        self,
        target: Callable[..., Any],
        *args: Any,
        like: fx.Node,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        val: Any = None,
        **kwargs: Any,
    ) -> fx.Node:
        """Insert ``target(*args, **kwargs)`` before or after a node, with the provenance of ``like``."""
        with self._at(before, after):
            node = self.graph.call_function(target, args, kwargs)
        return self._finish(node, like, val if val is not None else fake_call(*args, call=target, **kwargs))

    def numbered(self, name: str) -> str:
        """``name_0``, ``name_1``, ...: the next one, counting from the last one given, that is not taken."""
        while _has(self.gm, numbered := f"{name}_{self._numbers[name]}"):
            self._numbers[name] += 1
        return numbered

    def module(self, name: str, *args: Any, like: fx.Node, before: fx.Node | None = None, val: Any = None) -> fx.Node:
        """Insert a call of the sub-module ``name``."""
        with self._at(before, None):
            node = self.graph.call_module(name, args)
        return self._finish(node, like, val)

    def constant(
        self, name: str, value: torch.Tensor, like: fx.Node, before: fx.Node, derived: Derived | None = None
    ) -> fx.Node:
        """Register ``value`` as a buffer under a free name close to ``name`` and insert its ``get_attr``.

        ``derived`` says how it follows from other constants, if it does.
        """
        name = free_name(self.gm, name)
        set_constant(self.gm, name, value)
        if derived is not None:
            derived_constants(self.gm)[name] = derived
            if derived.form is not None:
                self._derived[derived.form] = name
        return self.attribute(name, like=like, before=before, value=value)

    def derived(self, form: Hashable, like: fx.Node, before: fx.Node) -> fx.Node | None:
        """Insert a ``get_attr`` of the constant that this editor registered as derived by ``form``, if it did."""
        name = self._derived.get(form)
        return None if name is None else self.attribute(name, like, before, get_constant(self.gm, name))

    def attribute(self, name: str, like: fx.Node, before: fx.Node, value: torch.Tensor) -> fx.Node:
        """Insert a ``get_attr`` of an existing attribute."""
        with self.graph.inserting_before(before):
            node = self.graph.create_node("get_attr", name)
        form: tuple[Any, ...] = (value.shape, value.dtype, value.device, value.layout)
        if value.layout == torch.strided:
            form = (*form, value.stride())
        if form not in self._constants:  # a fake value has no content: constants of one form share it
            self._constants[form] = fake_constant(value, fake_mode_of(self.graph))
        return self._finish(node, like, self._constants[form])

    def splice(self, body: fx.Graph, inputs: Iterable[fx.Node], *, like: fx.Node, before: fx.Node) -> fx.Node:
        """Insert the nodes of ``body``, a graph of operators with one result, with ``inputs`` for its placeholders."""
        copies = dict(zip(body.find_nodes(op="placeholder"), inputs, strict=True))
        with self.graph.inserting_before(before):
            for node in body.nodes:
                if node.op == "call_function":
                    copies[node] = self.graph.node_copy(node, lambda n: copies[n])
                    copies[node].meta = {}
                    self._finish(copies[node], like, node.meta["val"])
        return copies[body.output_node().args[0]]

    def _finish(self, node: fx.Node, like: fx.Node, val: Any) -> fx.Node:
        for key in INHERITED:
            if key in like.meta:
                node.meta[key] = like.meta[key]
        source = NodeSource(None, self.pass_name, NodeSourceAction.CREATE)  # of a node, it copies the whole history
        source.node_info = NodeSource.NodeInfo(like.name, str(like.target), id(like.graph))
        source.from_node = list(like.meta.get("from_node", ()))
        node.meta["from_node"] = [source]
        if val is not None:
            node.meta["val"] = val
        return node

    @contextlib.contextmanager
    def _at(self, before: fx.Node | None, after: fx.Node | None) -> Iterator[None]:
        with self.graph.inserting_before(before) if before is not None else self.graph.inserting_after(after):
            yield


def get_constant(gm: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor behind a dotted ``get_attr`` target."""
    found: Any = gm
    for part in name.split("."):
        found = getattr(found, part)
    return found


def set_constant(gm: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Register ``value`` as a buffer at a dotted name, making the sub-modules on the way."""
    *path, leaf = name.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        child = getattr(owner, part, None)
        if not isinstance(child, torch.nn.Module):
            child = torch.nn.Module()
            owner.add_module(part, child)
        owner = child
    owner.register_buffer(leaf, value)


def free_name(gm: torch.nn.Module, name: str) -> str:
    """``name``, or ``name_1``, ``name_2``, ... whichever is not taken and was never a constant's.

    Dots become underscores where an attribute of every module stands in the way, as one called ``train`` does.
    """
    if not _may_hold(gm, name):
        name = name.replace(".", "_")
    candidate, number = name, 0
    while _has(gm, candidate) or is_known(gm, candidate):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _may_hold(gm: torch.nn.Module, name: str) -> bool:
    """Whether every holder on the way to ``name`` is a module, or may become one."""
    found: Any = gm
    for part in name.split(".")[:-1]:
        found = getattr(found, part, torch.nn.Module())
        if not isinstance(found, torch.nn.Module):
            return False
    return True


def _has(gm: torch.nn.Module, name: str) -> bool:
    found: Any = gm
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def copy_graph_module(gm: fx.GraphModule, kind: type[GraphModule] = GraphModule) -> fx.GraphModule:
    """A copy of the graph, its sub-graphs and its module tree that shares every tensor and observer with ``gm``.

    Holder modules are new, so that constants may be added to the copy without touching the original; parameters and
    buffers are the same tensors, so no weight is copied. What the graph does not read is left behind. A ``Draft`` is
    for the caller that will rebuild it.
    """
    graph = fx.Graph(tracer_cls=getattr(gm.graph, "_tracer_cls", None))
    mapping: dict[fx.Node, fx.Node] = {}
    result_value = graph.graph_copy(gm.graph, mapping)
    source_output = gm.graph.output_node()
    graph.output(result_value).meta = copy.copy(source_output.meta)
    graph.set_codegen(gm.graph._codegen)
    return rebuild(gm, graph, kind)


def rebuild(gm: fx.GraphModule, graph: fx.Graph | None = None, kind: type[GraphModule] = GraphModule) -> fx.GraphModule:
    """A module around ``graph`` (by default ``gm``'s own) that holds just what the graph reads, tensors shared.

    Its code is generated from the graph as it is now, that of its sub-graphs too.
    """
    graph = gm.graph if graph is None else graph
    result = kind(gm, graph, type(gm).__name__)
    result.meta = {key: copy.copy(value) for key, value in gm.meta.items()}
    result.training = gm.training
    for node in graph.nodes:
        if node.op != "get_attr":
            continue
        value = get_constant(gm, node.target)
        if isinstance(value, fx.GraphModule):
            region = copy_graph_module(value, kind) if graph is not gm.graph else rebuild(value, kind=kind)
            replace_submodule(result, node.target, region)
        elif not _is_persistent(gm, node.target):
            owner, leaf = owner_of(result, node.target)
            owner._non_persistent_buffers_set.add(leaf)
    return result


def owner_of(gm: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The sub-module that holds the dotted attribute ``name``, and the attribute's last part."""
    path, _, leaf = name.rpartition(".")
    return gm.get_submodule(path), leaf


def take_over(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let ``module`` hold the parameters, buffers and sub-modules of ``other``."""
    module._parameters.update(other._parameters)
    module._buffers.update(other._buffers)
    module._modules.update(other._modules)
    module._non_persistent_buffers_set |= other._non_persistent_buffers_set


def holder(module: torch.nn.Module) -> torch.nn.Module:
    """A module that computes nothing and holds what ``module`` holds; holders inside it are new ones, too."""
    result = torch.nn.Module()
    take_over(result, module)
    for name, child in result._modules.items():
        if type(child) is torch.nn.Module:
            result._modules[name] = holder(child)
    return result


def replace_submodule(gm: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put ``module`` in the place of the sub-module at a dotted name."""
    owner, leaf = owner_of(gm, name)
    setattr(owner, leaf, module)


def _is_persistent(gm: torch.nn.Module, name: str) -> bool:
    owner, leaf = owner_of(gm, name)
    return leaf not in owner._non_persistent_buffers_set


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of ``nodes``, users first, that nothing uses any more."""
    for node in nodes:
        if not node._erased and not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
