"""Which nodes of a graph may share memory. A pass asks before it drops a copy or an in-place write.

Three sources are joined, because each alone would miss cases: the alias annotations of operator schemas, the storages
of the fake values in ``meta["val"]``, and a list of operators that may return an input without saying so.
"""

from __future__ import annotations

from collections.abc import Set
from typing import Any

import torch
from torch import fx

from qpass import torch_private

# Control flow, which torch refuses to trace when a result aliases an operand.
_FRESH = frozenset({"cond", "while_loop", "scan", "associative_scan", "map_impl"})

# Composite operators whose schema promises a fresh result and whose result may be the input or a view of it.
_RETURN_INPUT = frozenset(
    f"aten::{name}"
    for name in (
        "dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "type_as", "einsum", "pad",
        "meshgrid", "broadcast_tensors", "atleast_1d", "atleast_2d", "atleast_3d",
        "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes",
    )
)  # fmt: skip


# Running statistics are written in training, which the schema does not say: (names of them, that of the training flag).
_STATISTICS: dict[Any, tuple[tuple[str, ...], str]] = {
    torch.ops.aten.batch_norm.default: (("running_mean", "running_var"), "training"),
    torch.ops.aten.instance_norm.default: (("running_mean", "running_var"), "use_input_stats"),
}


def aliased_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory a node's result may share; the result of a function without a schema may share any."""
    if node.op in ("placeholder", "get_attr"):
        return []
    if isinstance(node.target, torch_private.HigherOrderOperator) and node.target.name() in _FRESH:
        return []
    if not isinstance(node.target, torch_private.OpOverload):
        return list(node.all_input_nodes)  # getitem, the other higher-order operators, sub-modules
    schema = node.target._schema
    if schema.name in _RETURN_INPUT:
        return list(node.all_input_nodes)
    found: list[fx.Node] = []
    for argument, value in arguments(node):
        if argument.alias_info is not None:
            fx.node.map_arg(value, found.append)
    return found


def arguments(node: fx.Node) -> list[tuple[torch.Argument, Any]]:
    """The given arguments of an operator call, each with its schema entry."""
    entries = node.target._schema.arguments  # type: ignore[union-attr]
    positional = list(zip(entries, node.args, strict=False))
    if not node.kwargs:
        return positional
    by_name = {entry.name: entry for entry in entries}
    return positional + [(by_name[name], value) for name, value in node.kwargs.items()]


def all_arguments(node: fx.Node) -> list[tuple[torch.Argument, Any]]:
    """As :func:`arguments`, with the defaults of those not given."""
    given = {entry.name: (entry, value) for entry, value in arguments(node)}
    return [given.get(e.name, (e, e.default_value)) for e in node.target._schema.arguments]  # type: ignore[union-attr]


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that an operator call writes to."""
    if node.op != "call_function" or not isinstance(node.target, torch_private.OpOverload):
        return []
    found: list[fx.Node] = []
    if node.target in _STATISTICS:
        names, flag = _STATISTICS[node.target]
        given = {entry.name: value for entry, value in arguments(node)}
        return [given[name] for name in names if given[flag] and isinstance(given[name], fx.Node)]
    if not node.target._schema.is_mutable:
        return []
    for argument, value in arguments(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            fx.node.map_arg(value, found.append)
    return found


def storages(node: fx.Node) -> list[int]:
    """Identities of the storages behind a node's fake value."""
    val = node.meta.get("val")
    leaves = val if isinstance(val, (tuple, list)) else (val,)
    return [
        leaf.untyped_storage()._cdata
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.layout == torch.strided
    ]


def written_nodes(graph: fx.Graph) -> Set[fx.Node]:
    """The nodes whose memory some operator of the graph writes to: what they hold depends on when it is read.

    Empty for a graph without in-place writes, which is most of them once :mod:`qpass.ir.normalize` has run.
    """
    if not any(written_inputs(node) for node in graph.nodes):
        return frozenset()
    memory = Memory(graph)
    return {node for node in graph.nodes if memory.is_written(node)}


class Memory:
    """The nodes of a graph in sets that may share memory, and what happens to each set."""

    def __init__(self, graph: fx.Graph) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        owner: dict[int, fx.Node] = {}
        for node in graph.nodes:
            self._parent[node] = node
            if node.op == "output":
                continue
            for source in aliased_inputs(node):
                self._join(node, source)
            for storage in storages(node):
                self._join(node, owner.setdefault(storage, node))
        self._written = {self._root(source) for node in graph.nodes for source in written_inputs(node)}
        self._returned = {self._root(source) for source in graph.output_node().all_input_nodes}

    def is_written(self, node: fx.Node) -> bool:
        """Whether any operator writes to memory that the node may share."""
        return self._root(node) in self._written

    def is_returned(self, node: fx.Node) -> bool:
        """Whether memory that the node may share leaves the graph, for the caller to write to."""
        return self._root(node) in self._returned

    def _root(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = self._parent[self._parent[node]]
            node = self._parent[node]
        return node

    def _join(self, a: fx.Node, b: fx.Node) -> None:
        self._parent[self._root(a)] = self._root(b)
