"""Constant expressions: the part of a graph that reads nothing but parameters and buffers.

A weight is rarely a bare ``get_attr``: it may be transposed, folded with a batch norm, or concatenated with its
siblings. Everything here works on the *expression* and evaluates it one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.alias import written_nodes
from qpass.ir.attributes import get_constant


class Constants:
    """Whether nodes are constant, and the values of those that are. Answers are remembered for one pass."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self._known: dict[fx.Node, bool] = dict.fromkeys(written_nodes(gm.graph), False)

    def __contains__(self, node: object) -> bool:
        if not isinstance(node, fx.Node):
            return False
        pending = [node]
        while pending:  # iterative: chains of views may be long
            current = pending[-1]
            if current in self._known:
                pending.pop()
                continue
            if current.op == "get_attr":
                self._known[current] = isinstance(get_constant(self.gm, str(current.target)), torch.Tensor)
            elif current.op != "call_function" or not current.all_input_nodes or not is_pure(current):
                self._known[current] = False
            else:
                unknown = [source for source in current.all_input_nodes if source not in self._known]
                if unknown:
                    pending.extend(unknown)
                    continue
                self._known[current] = all(self._known[source] for source in current.all_input_nodes)
            pending.pop()
        return self._known[node]

    def value(self, node: fx.Node) -> torch.Tensor:
        """The value of a constant node, computed now; a bare ``get_attr`` is the parameter itself, not a copy."""
        names, compute = expression(node)
        with torch.no_grad():
            return compute(*(get_constant(self.gm, name).detach() for name in names))


def is_pure(node: fx.Node) -> bool:
    """Whether the operation neither writes to its inputs nor draws random numbers."""
    if not isinstance(node.target, torch_private.OpOverload):
        return node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "operator")
    return not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags


def expression(node: fx.Node) -> tuple[tuple[str, ...], Callable[..., torch.Tensor]]:
    """The names that a constant node reads and a function of their values; it holds no reference to the graph."""
    names, steps, result = _steps(node)

    def compute(*values: torch.Tensor) -> torch.Tensor:
        known: dict[int | str, Any] = dict(zip(names, values, strict=True))

        def fill(argument: Any) -> Any:
            if isinstance(argument, _Slot):
                return known[argument.key]
            if isinstance(argument, (list, tuple)):
                return [fill(item) for item in argument]
            return argument

        for index, (target, args, kwargs) in enumerate(steps):
            known[index] = target(*map(fill, args), **{key: fill(item) for key, item in kwargs.items()})
        return known[result.key]

    return names, compute


def form(node: fx.Node) -> str:
    """The expression of a constant node as text: equal texts, in one graph, are equal values."""
    return repr(_steps(node))


def _steps(node: fx.Node) -> tuple[tuple[str, ...], list[tuple[Any, Any, Any]], _Slot]:
    """The names that a constant node reads, the operations on them in order, and where the result is."""
    names: list[str] = []
    steps: list[tuple[Any, Any, Any]] = []
    slots: dict[fx.Node, int | str] = {}

    def visit(current: fx.Node) -> Any:
        if current in slots:
            return _Slot(slots[current])
        if current.op == "get_attr":
            name = str(current.target)
            if name not in names:
                names.append(name)
            slots[current] = name
            return _Slot(name)
        args, kwargs = fx.node.map_arg((current.args, current.kwargs), visit)
        steps.append((current.target, args, kwargs))
        slots[current] = len(steps) - 1
        return _Slot(slots[current])

    result = visit(node)
    return tuple(names), steps, result


@dataclass(frozen=True)
class _Slot:
    key: int | str
