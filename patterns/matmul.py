"""Matrix products."""

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


class Matmul(Island):
    """act(matmul(dq(x), dq(w)) + b)  ->  qlinear(x, pack(w^T), b, act)

    ``w`` is a stored ``[K, N]`` matrix, as in GPT-2's projections or in ``einsum("bi,io->bo", x, w)``.

    A product of two activations (attention scores)
    is declined: the x86 kernel wants one operand packed beforehand, and bfloat16 is faster than packing at run time.
    """

    name = "matmul"
    operands = {"x": ACTIVATION, "w": WEIGHT(axis=1), "b": FLOAT}
    epilogues = (relu, gelu, silu, hardswish, relu6, add)

    def pattern(self, x: Any, w: Any, b: Any, equation: Any) -> list[Expr]:
        bare = [aten.mm(x, w), aten.matmul(x, w), aten.einsum(equation, [x, w])]
        return [aten.addmm(b, x, w, beta=1, alpha=1), *bare]

    def matches(self, node: fx.Node, fusions: Iterable[tuple[str, ...]], taken: Any = ()) -> Iterator[IslandMatch]:
        if node.target is not EINSUM or is_product(node, "io"):
            yield from super().matches(node, fusions, taken)

    def check(self, m: IslandMatch, constants: Constants) -> None:
        swapped = is_stored(m.x, constants)
        require(not swapped, "the stored operand stands on the left, and kernels take it on the right")
        stored = is_stored(m.w, constants)
        require(stored, "both operands are activations, and packing one at run time costs too much")
        require(m.w.meta["val"].dim() == 2, "the stored operand is not a matrix")
        require(m.w in constants, "the stored operand's size is only known at run time")
        require(m.x.meta["val"].dim() >= 1, "the input has no rows")
        b = m.captures.setdefault("b", None)
        is_vector = b is None or (b in constants and tuple(b.meta["val"].shape) == (m.w.meta["val"].shape[1],))
        require(is_vector, "the added term is no stored bias vector")
