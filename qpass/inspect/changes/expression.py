"""Changed nodes as expressions: ``linear(observe(x), observe(weight), bias)``, the same letter for the same value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic.numerics import dtype_name
from qpass.inspect.changes.change import Change
from qpass.inspect.values.nodes import INPUT, Keyword, NodeView, Snapshot

LETTERS = "xyzabcdefgh"
LONGEST = 16
"""Operations written out in one expression; the rest of it is ``..``."""
_COUNTED = re.compile(r"_\d+$")


def expressions(
    before: Snapshot, after: Snapshot, pairs: Mapping[int, int], members: Sequence[Change]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The values that ``members`` compute, as expressions over what lies outside: as they were, as they are.

    Literal arguments other than dtypes are written only where nothing else tells the two apart, and the dtype of a
    result only where it changed.
    """
    old = [change.before for change in members if change.before]
    new = [change.after for change in members if change.after]
    cast = [c for c in members if c.before and c.after and _dtype(c.before) != _dtype(c.after)]
    for literals in (False, True):
        letters = _Letters()
        left = _Writer(before, old, {c.before.index for c in cast if c.before}, literals, letters, pairs)
        right = _Writer(after, new, {c.after.index for c in cast if c.after}, literals, letters, None)
        texts = tuple(left.lines()), tuple(right.lines())
        if texts[0] != texts[1]:
            break
    return texts


def short_name(view: NodeView) -> str:
    """A node in one word: ``q`` and ``dq``, ``observe``, ``linear``, the last name of a constant."""
    if view.op == "get_attr":
        return _COUNTED.sub("", view.operator.rpartition(".")[2])
    if view.op == "placeholder":
        return view.name
    if not view.is_transparent:
        return view.short.partition(".")[0] if view.operator.startswith("aten.") else view.short
    if view.op == "call_module":
        return "observe"
    words = (("dequantize", "dq"), ("choose_qparams", "choose_qparams"), ("quantize", "q"))
    return next((short for word, short in words if view.short.startswith(word)), view.short)


def literal(value: Any) -> str:
    """A literal argument as people write it."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value).removeprefix("torch.")
    if isinstance(value, Keyword):
        return f"{value.name}={literal(value.value)}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    return str(value)


def _dtype(view: NodeView) -> str:
    return dtype_name(view.val.dtype) if isinstance(view.val, Tensor) else ""


class _Letters(dict[int, str]):
    """A letter for each value, in order of appearance: by its node after, or minus its node before where it is gone."""

    def __missing__(self, key: int) -> str:
        count = len(self)
        self[key] = LETTERS[count] if count < len(LETTERS) else f"x{count}"
        return self[key]


class _Writer:
    """Writes the nodes of one side; observers and q/dq outside are written too, other nodes outside are letters."""

    def __init__(
        self, graph: Snapshot, members: Sequence[NodeView], cast: set[int], literals: bool, letters: _Letters,
        pairs: Mapping[int, int] | None,
    ) -> None:  # fmt: skip
        self.graph, self.cast, self.literals = graph, cast, literals
        self.letters, self.pairs = letters, pairs
        self.members = {view.index: view for view in members}
        self._left = LONGEST

    def lines(self) -> Iterator[str]:
        """One expression for each member that no other member reads."""
        for index, view in self.members.items():
            if any(user in self.members for user, _ in self.graph.users[index]):
                continue
            self._left = LONGEST
            text = self._write(index)
            yield f"{text}: {_dtype(view)}" if index in self.cast else text

    def _write(self, index: int) -> str:
        view = self.graph.nodes[index]
        if view.op == "get_attr":
            return short_name(view)
        if index not in self.members and not view.is_transparent:
            return self.letters[index if self.pairs is None else self.pairs.get(index, -1 - index)]
        if self._left <= 0:
            return ".."
        self._left -= not view.is_transparent
        inputs = iter(view.inputs)
        parts = [self._argument(argument, inputs) for argument in view.template]
        if view.is_transparent and not self.literals:
            computed = any(self.graph.nodes[source].is_transparent for source in view.inputs[1:])
            parts = [*parts[:1], "dynamic"] if computed and short_name(view) == "q" else parts[:1]
        return f"{short_name(view)}({', '.join(part for part in parts if part)})"

    def _argument(self, argument: Any, inputs: Iterator[int]) -> str:
        if argument is INPUT:
            return self._write(next(inputs))
        if isinstance(argument, Keyword):
            inner = self._argument(argument.value, inputs)
            return f"{argument.name}={inner}" if inner else ""
        if isinstance(argument, tuple) and _holds_input(argument):
            return f"[{', '.join(filter(None, (self._argument(item, inputs) for item in argument)))}]"
        return literal(argument) if self.literals or isinstance(argument, torch.dtype) else ""


def _holds_input(argument: Any) -> bool:
    if isinstance(argument, tuple):
        return any(map(_holds_input, argument))
    return argument is INPUT
