"""q, dq, choose_qparams -> plain ATen: the table that ``make_fx`` and Inductor take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

from qpass.ops.corrected import quantized_decomposed
from qpass.ops.decomposed import OPERATORS, graph_ops, overload


def table() -> dict[OpOverload, Callable[..., Any]]:
    """A fresh ``{operator: decomposition}`` of the operators that graphs carry and of the corrected ones.

    Give it to ``make_fx(decomposition_table=...)``, or to Inductor together with its own:
    ``compile_fx(gm, inputs, decompositions={**select_decomp_table(), **table()})``. Inductor then fuses the
    arithmetic into its neighbours and never meets its own lowerings of these operators. Codes equal the eager
    operators'; the exceptions are listed in `qpass.ops.kernels`.
    """
    return {
        overload(name, namespace): kernel
        for namespace in (graph_ops, quantized_decomposed)
        for name, (_, kernel) in OPERATORS.items()
    }
