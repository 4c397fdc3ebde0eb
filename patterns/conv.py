"""Convolutions."""

from __future__ import annotations

from itertools import cycle
from typing import Any

from qpass.ir.constants import Constants
from qpass.ir.expression import Expr, aten
from qpass.ir.rule import require
from qpass.islands.island import ACTIVATION, FLOAT, WEIGHT, Island, IslandMatch
from qpass.patterns.epilogues import add_codes, batch_norm, hardswish, relu, relu6, silu


class Conv(Island):
    """act(batch_norm(conv(dq(x), dq(w), b)) [+ dq(other)])  ->  qconv(x, pack(fold(w)), fold(b), other, act)

    ``x`` is ``[B, C, ...]`` with one to three spatial dimensions, ``w`` is ``[O, C / groups, ...]`` with one scale
    per output channel. Batch norm in evaluation mode is folded into ``w`` and ``b`` before the weight is rounded.
    """

    name = "conv"
    operands = {"x": ACTIVATION, "w": WEIGHT(axis=0), "b": FLOAT}
    epilogues = (batch_norm, add_codes, relu, silu, hardswish, relu6)

    def pattern(self, x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: Any) -> list[Expr]:
        rest = (x, w, b, stride, padding, dilation, groups)
        spelled = [aten.conv2d.padding(*rest), aten.conv1d.padding(*rest), aten.conv3d.padding(*rest)]
        return [aten.conv2d(*rest), aten.conv1d(*rest), aten.conv3d(*rest), *spelled]

    def check(self, m: IslandMatch, constants: Constants) -> None:
        require(m.w in constants, "the weight is computed, not stored")
        require(m.b is None or m.b in constants, "the bias is computed, not stored")
        if m.padding == "same":
            kernel = m.w.meta["val"].shape[2:]
            sides = [step * (size - 1) % 2 for step, size in zip(cycle(m.dilation), kernel, strict=False)]
            require(not any(sides), "padding='same' pads one side of an even kernel more than the other")
        if m.batch_norm is not None:
            parameters = (m.bn_weight, m.bn_bias, m.mean, m.variance)
            require(all(p is None or p in constants for p in parameters), "the batch norm's statistics are computed")
            require(m.mean is not None and m.variance is not None, "the batch norm keeps no running statistics")
