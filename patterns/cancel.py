"""q/dq pairs that undo each other."""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.arithmetic import graph_ops as ops
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr
from qpass.ir.match import Match
from qpass.ir.rule import Rule, require
from qpass.islands.qdq import as_dequantize, as_quantize


class Requantize(Rule):
    """quantize(dequantize(codes)) with the same qparams  ->  codes

    Exact: ``(codes - zero_point) * scale * (1 / scale)`` is within ``2**-22 * 255`` of a whole number.
    """

    def pattern(self, x: Any, scale: Any, zero_point: Any, low: Any, high: Any, dtype: Any) -> Expr:
        return Expr(ops.quantize_per_tensor.default, (x, scale, zero_point, low, high, dtype), {})

    def check(self, m: Match, constants: Constants) -> None:
        outer, inner = as_quantize(m.root), as_dequantize(m.x)
        require(inner is not None, "the quantized value is not a dequantized one")
        assert outer is not None
        assert inner is not None
        require(outer.qparams == inner.qparams, "the two roundings have different qparams")

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        inner = as_dequantize(m.x)
        assert inner is not None
        return inner.value
