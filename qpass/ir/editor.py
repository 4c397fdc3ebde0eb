"""Inserting nodes into FX graphs: each keeps the provenance of the node that it stands for."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.traceback import NodeSource, NodeSourceAction

from qpass.ir.attributes import free_name, get_constant, is_taken, set_constant
from qpass.ir.fake import fake_call, fake_constant, fake_mode_of
from qpass.ir.origins import Derived, derived_constants

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
        while is_taken(self.gm, numbered := f"{name}_{self._numbers[name]}"):
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


def erase_dead(graph: fx.Graph, nodes: Iterable[fx.Node]) -> None:
    """Erase those of ``nodes``, users first, that nothing uses any more."""
    for node in nodes:
        if not node._erased and not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)
