"""The catalogue, installed as `qpass.patterns`: one file an idea.

Each says which float pattern is meant, and which of its edges may be quantized. Which kernels run it is for targets to
say (`qpass.targets`). What it takes to write an island of one's own is here, too.
"""

from __future__ import annotations

if __name__ != "qpass.patterns":  # found as a top-level folder: every rule would exist twice, under two names
    raise ImportError(
        f"the pattern catalogue is the package 'qpass.patterns', but it was imported as {__name__!r}\n"
        "  to do: write 'import qpass.patterns'; if that fails, install qpass (pip install -e .)"
    )

from qpass.comm.graph.collective import KINDS, WAIT
from qpass.ir.expression import Expr, aten
from qpass.ir.rule import require
from qpass.islands.island import (
    ACTIVATION,
    FLOAT,
    WEIGHT,
    Epilogue,
    Island,
    IslandMatch,
    Specs,
    codes_of,
    quantized_operands,
)
from qpass.patterns.attention import KEPT as _ATTENTION
from qpass.patterns.collectives import COLLECTIVES
from qpass.patterns.conv import Conv
from qpass.patterns.elementwise import KEPT as _ELEMENTWISE
from qpass.patterns.elementwise import Add, Mul
from qpass.patterns.embedding import Embedding
from qpass.patterns.linear import Linear
from qpass.patterns.matmul import Matmul
from qpass.patterns.normalization import KEPT as _NORMALIZATION
from qpass.patterns.pooling import AvgPool
from qpass.patterns.weights import CARRIED, OF_WEIGHTS

CATALOGUE: tuple[Island, ...] = (Linear(), Matmul(), Conv(), Embedding(), Add(), Mul(), AvgPool())
"""Every island; the order matters only where two are rooted at the same operator."""

_COLLECTIVES = dict.fromkeys((*KINDS, WAIT), "what it sends is decided after all else: the notes say how")

KEPT_IN_FLOAT: dict[object, str] = {**_COLLECTIVES, **_ATTENTION, **_ELEMENTWISE, **_NORMALIZATION}
"""Operators that are left in floating point on purpose, each with its reason."""

__all__ = [
    "ACTIVATION", "CARRIED", "CATALOGUE", "COLLECTIVES", "FLOAT", "KEPT_IN_FLOAT", "OF_WEIGHTS", "WEIGHT", "Add",
    "AvgPool", "Conv", "Embedding", "Epilogue", "Expr", "Island", "IslandMatch", "Linear", "Matmul", "Mul", "Specs",
    "aten", "codes_of", "quantized_operands", "require",
]  # fmt: skip
