"""Linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from qpass.ir.constants import Constants
from qpass.ir.expression import Expr, aten
from qpass.ir.rule import require
from qpass.islands.float_weights import is_stored
from qpass.islands.island import ACTIVATION, FLOAT, WEIGHT, Island, IslandMatch
from qpass.patterns.einsum import EINSUM, is_product
from qpass.patterns.epilogues import add, gelu, hardswish, relu, relu6, silu


class Linear(Island):
    """act(linear(dq(x), dq(w), b) [+ other])  ->  qlinear(x, pack(w), b, act)

    ``x`` is ``[..., K]``, ``w`` is ``[N, K]`` with one scale per output channel, ``b`` is ``[N]`` and stays float.
    ``einsum("bi,oi->bo", x, w)`` is one, too.

    Activations are rounded per tensor (static or dynamic), per token (dynamic), or not at all (weight-only).
    """

    name = "linear"
    operands = {"x": ACTIVATION, "w": WEIGHT(axis=0), "b": FLOAT}
    epilogues = (relu, gelu, silu, hardswish, relu6, add)

    def pattern(self, x: Any, w: Any, b: Any, equation: Any) -> list[Expr]:
        return [aten.linear(x, w, b), aten.einsum(equation, [x, w])]

    def matches(self, node: fx.Node, fusions: Iterable[tuple[str, ...]], taken: Any = ()) -> Iterator[IslandMatch]:
        if node.target is EINSUM and not is_product(node, "oi"):
            return
        for m in super().matches(node, fusions, taken):
            m.captures.setdefault("b", None)
            yield m

    def check(self, m: IslandMatch, constants: Constants) -> None:
        swapped = is_stored(m.x, constants) and not is_stored(m.w, constants)
        require(not swapped, "a stored matrix stands in the place of the input, and the weight is computed")
        require(m.w in constants, "the weight is computed, not stored")
        require(m.b is None or m.b in constants, "the bias is computed, not stored")
        require(m.x not in constants, "the input is itself a constant")
