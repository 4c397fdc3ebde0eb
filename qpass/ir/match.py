"""Matching an expression against the graph, backwards from its root; cost is the size of the expression."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import fx

from qpass import torch_private
from qpass.ir.expression import Expr, Var, build


class Match:
    """An expression found in a graph: ``m.root``, ``m.nodes`` (inputs first) and each capture as an attribute."""

    def __init__(self, root: fx.Node, nodes: tuple[fx.Node, ...], captures: dict[str, Any]) -> None:
        self.root = root
        self.nodes = nodes
        self.captures = captures

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["captures"][name]
        except KeyError:
            raise AttributeError(f"this match has no capture {name!r}") from None


class Matcher:
    """All alternatives of a pattern function, indexed by the operator at their root."""

    def __init__(self, pattern: Callable[..., Expr | Iterable[Expr]]) -> None:
        self.alternatives = build(pattern)

    @property
    def roots(self) -> set[torch_private.OpOverload]:
        """The operators that a match can be rooted at."""
        return {expr.op for expr in self.alternatives}

    def match(self, node: fx.Node, bound: dict[str, Any] | None = None) -> Match | None:
        """The first alternative that ``node`` is the root of; ``bound`` fixes some captures beforehand."""
        for expr in self.alternatives:
            captures = dict(bound or {})
            nodes: list[fx.Node] = []
            if _match_expr(expr, node, captures, nodes):
                return Match(node, tuple(nodes), captures)
        return None


def _match_expr(expr: Expr, node: Any, captures: dict[str, Any], nodes: list[fx.Node]) -> bool:
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not expr.op:
        return False
    if nodes and len(node.users) > 1:  # an inner node with a second user cannot be absorbed
        return False
    actual = normalized(node)
    names = argument_names(expr.op)
    wanted = dict(zip(names, expr.args, strict=False)) | expr.kwargs
    nodes.insert(0, node)
    return all(_match_value(value, actual[name], captures, nodes) for name, value in wanted.items())


def _match_value(wanted: Any, actual: Any, captures: dict[str, Any], nodes: list[fx.Node]) -> bool:
    if isinstance(wanted, Var):
        if wanted.name in captures:
            return captures[wanted.name] is actual or (
                not isinstance(actual, fx.Node) and captures[wanted.name] == actual
            )
        captures[wanted.name] = actual
        return True
    if isinstance(wanted, Expr):
        return _match_expr(wanted, actual, captures, nodes)
    if isinstance(wanted, list) and isinstance(actual, (list, tuple)):
        pairs = zip(wanted, actual, strict=False)
        return len(wanted) == len(actual) and all(_match_value(*pair, captures, nodes) for pair in pairs)
    return bool(wanted == actual)


@cache
def argument_names(op: torch_private.OpOverload) -> tuple[str, ...]:
    """The names of an operator's arguments, in order."""
    return tuple(argument.name for argument in op._schema.arguments)


@cache
def _defaults(op: torch_private.OpOverload) -> dict[str, Any]:
    return {a.name: a.default_value for a in op._schema.arguments if a.has_default_value()}


def normalized(node: fx.Node) -> dict[str, Any]:
    """Every argument of an operator node by name, in the schema's order, defaults filled in."""
    assert isinstance(node.target, torch_private.OpOverload)
    names, defaults = argument_names(node.target), _defaults(node.target)
    given = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return {name: given[name] if name in given else defaults[name] for name in names}


def set_arguments(node: fx.Node, **changes: Any) -> None:
    """Give some arguments of an operator node other values, by name. All are written out then, as `normalized` reads
    them: those that may be positional are."""
    assert isinstance(node.target, torch_private.OpOverload)
    given = normalized(node) | changes
    by_name = {entry.name for entry in node.target._schema.arguments if entry.kwarg_only}
    node.args = tuple(value for name, value in given.items() if name not in by_name)
    node.kwargs = {name: value for name, value in given.items() if name in by_name}
