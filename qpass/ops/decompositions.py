"""q, dq, choose_qparams -> plain ATen: the table that ``make_fx`` and Inductor take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

from qpass.ops.decomposed import OPERATORS, overload


def table() -> dict[OpOverload, Callable[..., Any]]:
    """A fresh ``{operator: decomposition}`` of the `quantized_decomposed` operators.

    Give it to ``make_fx(decomposition_table=...)``, or to Inductor together with its own:
    ``compile_fx(gm, inputs, decompositions={**select_decomp_table(), **table()})``. Inductor then fuses the
    arithmetic into its neighbours and never meets its own lowerings of these operators. Codes equal the eager
    operators'; the exceptions are listed in `qpass.ops.kernels`.
    """
    return {overload(name): kernel for name, (_, kernel) in OPERATORS.items()}
