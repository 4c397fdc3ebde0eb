"""Embedding tables."""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.ir.constants import Constants
from qpass.ir.expression import Expr, aten
from qpass.ir.rule import require
from qpass.islands.island import WEIGHT, Island, IslandMatch


class Embedding(Island):
    """embedding(dq(w), indices)  ->  dq(embedding(w, indices)) with the scales of the rows that were looked up

    ``w`` is ``[V, D]`` with one scale per row; the table is read as int8 and only the rows in use are dequantized.
    """

    name = "embedding"
    operands = {"w": WEIGHT(axis=0)}

    def pattern(self, w: Any, indices: Any) -> Expr:
        return aten.embedding(w, indices)

    def check(self, m: IslandMatch, constants: Constants) -> None:
        written = isinstance(m.w, fx.Node) and m.w.op == "get_attr" and m.w not in constants
        require(not written, "the model writes to the table when it looks rows up, as max_norm does")
        require(m.w in constants, "the table is computed, not stored")
        require(m.indices not in constants, "the indices are constant, so the looked-up rows are a constant themselves")
