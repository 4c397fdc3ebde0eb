"""Sizes in a graph: whole numbers where they are known, else nodes, and the same arithmetic for both.

sizes(x)             [.., ..]     ints, and a `Size` for each dimension that is symbolic
(n + 127) // 128                  an int, or a Size whose nodes stand in the graph
argument(n)                       the int or the node, to be an operator's argument
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.ir.editor import Editor

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Size:
    """A symbolic size: a node, and where the nodes of its arithmetic go."""

    node: fx.Node
    call: Callable[..., fx.Node]

    @property
    def val(self) -> torch.SymInt:
        """The symbolic value."""
        return self.node.meta["val"]

    def __add__(self, other: int | Size) -> Size:
        return self if other == 0 else self._with(operator.add, other)

    def __sub__(self, other: int | Size) -> Size:
        return self._with(operator.sub, other)

    def __rsub__(self, other: int) -> Size:
        return Size(self.call(operator.sub, other, self.node), self.call)

    def __mul__(self, other: int | Size) -> int | Size:
        if other == 0:
            return 0
        return self if other == 1 else self._with(operator.mul, other)

    def __floordiv__(self, other: int) -> Size:
        return self if other == 1 else self._with(operator.floordiv, other)

    __radd__, __rmul__ = __add__, __mul__

    def _with(self, operation: Callable[..., Any], other: int | Size) -> Size:
        return Size(self.call(operation, self.node, argument(other)), self.call)


def sizes(
    edit: Editor, x: fx.Node, stated: Sequence[Any] = (), *, like: fx.Node, before: fx.Node
) -> list[int | Size]:  # fmt: skip
    """The shape of ``x`` in front of a node; ``stated`` are sizes of it that the graph holds already, as nodes."""
    found: list[int | Size] = []
    for dim, known in enumerate(x.meta["val"].shape):
        if not is_symbolic(known):
            found.append(int(known))
            continue
        node = stated[dim] if dim < len(stated) else None
        if not isinstance(node, fx.Node):
            node = edit.call(aten.sym_size.int, x, dim, like=like, before=before)
        found.append(size(edit, node, like=like, before=before))
    return found


def size(edit: Editor, given: int | fx.Node, *, like: fx.Node, before: fx.Node) -> int | Size:
    """An operator's argument as a size."""
    if not isinstance(given, fx.Node):
        return given
    return Size(given, lambda target, *args: edit.call(target, *args, like=like, before=before))


def argument(given: int | Size) -> int | fx.Node:
    """A size as an operator's argument."""
    return given.node if isinstance(given, Size) else given


def arguments(given: Iterable[int | Size]) -> list[int | fx.Node]:
    """Sizes as an operator's argument."""
    return [argument(each) for each in given]


def value_of(given: int | Size) -> int | torch.SymInt:
    """A size as a number, symbolic where it is."""
    return given.val if isinstance(given, Size) else given


def total(given: Iterable[int | Size]) -> int | Size:
    """The sum of sizes."""
    return _folded(operator.add, 0, given)


def product(given: Iterable[int | Size]) -> int | Size:
    """The product of sizes."""
    return _folded(operator.mul, 1, given)


def is_symbolic(number: int | torch.SymInt) -> bool:
    """Whether a size is symbolic: not one number that the graph was made for."""
    return isinstance(number, torch.SymInt) and number.node.maybe_as_int() is None


def is_data_dependent(number: int | torch.SymInt) -> bool:
    """Whether a size comes from the contents of a tensor, so that it is not known before the graph runs."""
    return isinstance(number, torch.SymInt) and _comes_from_data(number)


def is_known(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds for all that can occur; False where that is not known. Guards nothing."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # imports sympy

    return statically_known_true(condition)


def holds(condition: bool | torch.SymBool) -> bool:
    """Whether a condition on sizes holds, as it would for numbers: that guards the graph. `is_known` if from data."""
    if isinstance(condition, torch.SymBool) and _comes_from_data(condition):
        return is_known(condition)
    return bool(condition)


def _comes_from_data(value: torch.SymInt | torch.SymBool) -> bool:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols  # imports sympy

    return bool(free_unbacked_symbols(value))


def _folded(operation: Callable[..., Any], neutral: int, given: Iterable[int | Size]) -> int | Size:
    """Symbolic sizes first, so that what is known is one number."""
    known, unknown = neutral, []
    for each in given:
        if isinstance(each, Size):
            unknown.append(each)
        else:
            known = operation(known, each)
    return operation(functools.reduce(operation, unknown), known) if unknown else known
