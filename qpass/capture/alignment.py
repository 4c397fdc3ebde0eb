"""The operators of a trace in evaluation, each beside its twin in a trace in training that holds more of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import fx

from qpass.capture.graph_comparison import attribute_difference, match_arguments, steps
from qpass.ir.source import module_path


class Alignment:
    """Twins in order, and the values of evaluation that training replaces by ones drawn at random from them.

    The two traces have the same symbolic sizes. A *root* is a node of the training trace without a twin that operators
    with twins read. Whichever twins are chosen, operators of evaluation that read the roots compute what training
    computes.

    Args:
        gm, trains: the traces.
        drawn: the nodes of ``trains`` that draw random numbers.

    Attributes:
        twin, back: ``{node of gm: node of trains}``, and the inverse.
        replaced: ``{root: the value of gm that training replaces by it}``.
        reads: ``{node of gm: a root, or None where both modes read the same, for each node among its arguments}``.
        fault: the first node that has no place; None where every operator of evaluation has a twin.
    """

    def __init__(self, gm: fx.GraphModule, trains: fx.GraphModule, drawn: Collection[fx.Node]) -> None:
        self.gm, self.trains, self.drawn = gm, trains, drawn
        self.twin: dict[fx.Node, fx.Node] = {}
        self.back: dict[fx.Node, fx.Node] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}
        self.reads: dict[fx.Node, list[fx.Node | None]] = {}
        self.fault = self._align()

    def branches(self) -> dict[fx.Node, list[fx.Node]]:
        """The operators of ``trains`` behind each root, itself included, both in the order of ``trains``."""
        order = {node: index for index, node in enumerate(self.trains.graph.nodes)}
        return {
            root: sorted(upstream(root, self.back.keys() | self.replaced.keys()), key=order.__getitem__)
            for root in sorted(self.replaced, key=order.__getitem__)
        }

    def _align(self) -> fx.Node | None:
        candidates = steps(self.trains.graph, lambda _: False)
        start = 0
        for ours in steps(self.gm.graph, lambda _: False):
            found = self._find(ours, candidates, start)
            if found is None and ours.op == "get_attr" and ours.users:
                return next(iter(ours.users))  # a literal has no line
            if found is None:
                return next((node for node in candidates[start:] if node.op == "call_function"), ours)
            index, reads = found
            self.twin[ours], self.back[candidates[index]] = candidates[index], ours
            if any(root is not None for _, root in reads):
                self.reads[ours] = [root for _, root in reads]
                self.replaced.update((root, value) for value, root in reads if root is not None)
            start = index + 1
        return None

    def _find(
        self, ours: fx.Node, candidates: list[fx.Node], start: int
    ) -> tuple[int, list[tuple[fx.Node, fx.Node | None]]] | None:
        """Where the twin stands, and what it reads: the next node alike on the same line, or else on any."""
        first = None
        for index in range(start, len(candidates)):
            theirs = candidates[index]
            if ours.op != theirs.op or (ours.op == "call_function" and ours.target is not theirs.target):
                continue
            reads = self._reads(ours, theirs)
            if reads is not None:
                if _place(ours) == _place(theirs):
                    return index, reads
                first = first or (index, reads)
        return first

    def _reads(self, ours: fx.Node, theirs: fx.Node) -> list[tuple[fx.Node, fx.Node | None]] | None:
        if ours.op == "get_attr" and attribute_difference(self.gm, ours, self.trains, theirs, self.twin) is not None:
            return None
        reads: list[tuple[fx.Node, fx.Node | None]] = []

        def same(node: fx.Node, other: Any) -> bool:
            root = None if node not in self.twin or self.twin[node] is other else other
            reads.append((node, root))
            if node not in self.twin:  # a size
                return isinstance(other, (int, float, fx.Node))
            return root is None or (isinstance(root, fx.Node) and self._may_replace(root, node))

        return reads if match_arguments((ours.args, ours.kwargs), (theirs.args, theirs.kwargs), same) else None

    def _may_replace(self, root: fx.Node, value: fx.Node) -> bool:
        """Whether ``root`` is drawn at random from what ``value`` is in training, and has its sizes and dtype."""
        if root in self.back or root.op != "call_function" or self.replaced.get(root, value) is not value:
            return False
        twin = self.twin[value]
        if _form(root) is None or _form(root) != _form(twin):
            return False
        nodes = list(upstream(root, self.back.keys()))
        return any(node in self.drawn for node in nodes) and any(twin in node.all_input_nodes for node in nodes)


def upstream(node: fx.Node, stop: Collection[fx.Node]) -> Iterator[fx.Node]:
    """A node and the operators that it depends on, without those in ``stop`` and what lies behind them."""
    pending, seen = [node], {node}
    while pending:
        node = pending.pop()
        yield node
        for source in node.all_input_nodes:
            if source not in seen and source.op == "call_function" and source not in stop:
                seen.add(source)
                pending.append(source)


def _place(node: fx.Node) -> tuple[str, Any]:
    return module_path(node), node.meta.get("stack_trace")


def _form(node: fx.Node) -> tuple[str, torch.dtype] | None:
    val = node.meta.get("val")
    return (str(val.shape), val.dtype) if isinstance(val, torch.Tensor) else None
