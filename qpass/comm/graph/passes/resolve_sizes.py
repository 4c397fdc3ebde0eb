"""ResolveSizes reads symbolic sizes from the inputs of a graph, so that no tensor is kept for its size alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx.proxy import GraphAppendingTracer

from qpass import torch_private
from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.sizes import is_data_dependent, is_symbolic

if TYPE_CHECKING:
    import sympy

aten = torch.ops.aten


@dataclass(frozen=True)
class ResolveSizes(Pass):
    """``sym_size(wait(all_gather(x, 2)), 0)  ->  sym_size(x, 0) * 2``, x being an input; exact.

    What reads a tensor, and what waits for it, is then what it would be in a graph made for known sizes. A size that
    comes from data, or that the inputs do not tell, is left.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        resolver = _Resolver(Editor(gm, self.name))
        done = 0
        for node in list(gm.graph.nodes):
            val = node.meta.get("val")
            if node.op != "call_function" or not isinstance(val, torch.SymInt) or not is_symbolic(val):
                continue
            if not _is_read_off(node):
                resolver.made.setdefault(val.node.expr, node)
            elif (found := resolver.resolve(val.node.expr, node)) is not None:
                node.replace_all_uses_with(found)
                gm.graph.erase_node(node)
                done += 1
        return PassResult(done)


class _Resolver:
    """Nodes for expressions of sizes, each made once, where it is first asked for."""

    def __init__(self, edit: Editor) -> None:
        self.edit = edit
        self.made: dict[sympy.Expr, fx.Node] = {}
        self.given: dict[sympy.Expr, tuple[fx.Node, int]] = {}
        for node in edit.graph.find_nodes(op="placeholder"):
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt):
                self.made.setdefault(val.node.expr, node)
            elif isinstance(val, Tensor):
                for dim, size in enumerate(val.shape):
                    if isinstance(size, torch.SymInt):
                        self.given.setdefault(size.node.expr, (node, dim))

    def resolve(self, expression: sympy.Expr, before: fx.Node) -> fx.Node | None:
        """The node of an expression; None where the inputs do not tell it. Asked in the order of the graph."""
        place: Any = {"like": before, "before": before}
        if expression not in self.made:
            if expression in self.given:
                self.made[expression] = self.edit.call(aten.sym_size.int, *self.given[expression], **place)
            else:
                symbols = sorted(expression.free_symbols, key=str)
                if not all(symbol in self.made or symbol in self.given for symbol in symbols):
                    return None
                inputs = [node for symbol in symbols if (node := self.resolve(symbol, before)) is not None]
                body = _computed(expression, symbols, [node.meta["val"] for node in inputs])
                self.made[expression] = self.edit.splice(body, inputs, **place)
        return self.made[expression]


def _is_read_off(node: fx.Node) -> bool:
    """Whether a size is that of a computed tensor, and does not come from data."""
    reads = [source for source in node.all_input_nodes if isinstance(source.meta.get("val"), Tensor)]
    return not is_data_dependent(node.meta["val"]) and any(source.op != "placeholder" for source in reads)


def _computed(expression: sympy.Expr, symbols: list[sympy.Symbol], vals: list[torch.SymInt]) -> fx.Graph:
    """A graph that computes an expression, which is more than one symbol, from its symbols."""
    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    inputs = {symbol: fx.Proxy(graph.placeholder(symbol.name), tracer) for symbol in symbols}
    graph.output(torch_private.sympy_interp(torch_private.PythonReferenceAnalysis, inputs, expression).node)
    for proxy, val in zip(inputs.values(), vals, strict=True):
        proxy.node.meta["val"] = val
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["val"] = node.target(*fx.node.map_arg(node.args, lambda source: source.meta["val"]))
    return graph
