"""Average pooling."""

from __future__ import annotations

from typing import Any

from qpass.ir.expression import Expr, aten
from qpass.islands.island import ACTIVATION, Island


class AvgPool(Island):
    """avg_pool(dq(x))  ->  the same, with the dequantization fused into the pooling loop

    Only behind a convolution, which then writes codes. (Max pooling moves codes and needs no island: see ``views``.)
    """

    name = "avg_pool"
    operands = {"x": ACTIVATION}

    def pattern(self, x: Any) -> list[Expr]:
        return [aten.adaptive_avg_pool2d(x), aten.avg_pool2d(x), aten.adaptive_avg_pool1d(x), aten.mean.dim(x)]
