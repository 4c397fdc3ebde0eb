"""q, dq, choose_qparams -> plain ATen: the table that ``make_fx`` and Inductor take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpass.arithmetic import choose
from qpass.arithmetic.corrected import quantized_decomposed
from qpass.arithmetic.decomposed import OPERATORS, overload
from qpass.torch_private import OpOverload

AS_TORCH = {"choose_qparams_per_token": choose.choose_qparams_per_token_floored}
"""Where the corrected operator differs from torch's although torch's is sound in eager mode: a q/dq graph run eagerly
runs torch's, and compiled it must give the same codes."""

NOT_FUSED = "convert_element_type.no_fuse"  # stays whole: Inductor lowers it without fusing it


def table() -> dict[OpOverload, Callable[..., Any]]:
    """A fresh ``{operator: decomposition}`` of the operators that graphs carry and of the corrected ones.

    Give it to ``make_fx(decomposition_table=...)``, or to Inductor together with its own:
    ``compile_fx(gm, inputs, decompositions={**select_decomp_table(), **table()})``. Inductor then fuses the
    arithmetic into its neighbours and never meets its own lowerings of these operators. Codes equal the eager
    operators'; the exceptions are listed in `qpass.arithmetic.kernels`.
    """
    kernels = {name: kernel for name, (_, kernel) in OPERATORS.items() if name != NOT_FUSED}
    return {
        **{overload(name): kernel for name, kernel in {**kernels, **AS_TORCH}.items()},
        **{overload(name, quantized_decomposed): kernel for name, kernel in kernels.items()},
    }
