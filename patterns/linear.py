"""Linear layers."""

from __future__ import annotations

from typing import Any

from qpass.ir.constants import Constants
from qpass.ir.expression import Expr, aten
from qpass.ir.rule import require
from qpass.islands.island import ACTIVATION, FLOAT, WEIGHT, Island, IslandMatch
from qpass.patterns.epilogues import add, gelu, hardswish, relu, relu6, silu


class Linear(Island):
    """act(linear(dq(x), dq(w), b) [+ other])  ->  qlinear(x, pack(w), b, act)

    ``x`` is ``[..., K]``, ``w`` is ``[N, K]`` with one scale per output channel, ``b`` is ``[N]`` and stays float.
    Activations are rounded per tensor (static or dynamic), per token (dynamic), or not at all (weight-only).
    """

    name = "linear"
    operands = {"x": ACTIVATION, "w": WEIGHT(axis=0), "b": FLOAT}
    epilogues = (relu, gelu, silu, hardswish, relu6, add)

    def pattern(self, x: Any, w: Any, b: Any) -> Expr:
        return aten.linear(x, w, b)

    def check(self, m: IslandMatch, constants: Constants) -> None:
        require(m.w in constants, "the weight is computed, not stored")
        require(m.b is None or m.b in constants, "the bias is computed, not stored")
        require(m.x not in constants, "the input is itself a constant")
