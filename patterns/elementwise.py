"""Additions and products of two quantized tensors."""

from __future__ import annotations

from typing import Any

import torch

from qpass.ir.constants import Constants
from qpass.ir.expression import Expr, aten
from qpass.ir.rule import require
from qpass.islands.island import ACTIVATION, Island, IslandMatch
from qpass.patterns.epilogues import relu

aten_ops = torch.ops.aten
_LOOP = "element by element: Inductor fuses it into the loops around it"
KEPT: dict[object, str] = dict.fromkeys(
    (
        aten_ops.add.Tensor, aten_ops.sub.Tensor, aten_ops.mul.Tensor, aten_ops.div.Tensor, aten_ops.mul.Scalar,
        aten_ops.add.Scalar, aten_ops.neg.default, aten_ops.relu.default, aten_ops.gelu.default, aten_ops.silu.default,
        aten_ops.sigmoid.default, aten_ops.tanh.default, aten_ops.hardswish.default, aten_ops.hardtanh.default,
        aten_ops.relu6.default, aten_ops.hardsigmoid.default, aten_ops.leaky_relu.default,
        aten_ops.pow.Tensor_Scalar, aten_ops.rsqrt.default,
    ), _LOOP,
)  # fmt: skip


class _Elementwise(Island):
    operands = {"x": ACTIVATION, "other": ACTIVATION}
    epilogues = (relu,)

    def check(self, m: IslandMatch, constants: Constants) -> None:
        same = all(hasattr(v, "meta") and "val" in v.meta for v in (m.x, m.other))
        require(same and m.x.meta["val"].shape == m.other.meta["val"].shape, "the operands differ in shape")
        require(m.x not in constants and m.other not in constants, "an operand is a constant")


class Add(_Elementwise):
    """relu(dq(x) + dq(other))  ->  the same, with the dequantization fused into one loop over the codes

    Only where convolutions stand before and behind it: there the tensors are as large as the weights are small, and
    reading codes is what saves time. The residual stream of a transformer stays in floating point.
    """

    name = "add"

    def pattern(self, x: Any, other: Any) -> Expr:
        return aten.add.Tensor(x, other, alpha=1)


class Mul(_Elementwise):
    """relu(dq(x) * dq(other))  ->  the same, with the dequantization fused into one loop over the codes"""

    name = "mul"

    def pattern(self, x: Any, other: Any) -> Expr:
        return aten.mul.Tensor(x, other)
