"""Einsums that are products with one stored matrix, read off their equations."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

EINSUM = torch.ops.aten.einsum.default


def is_product(node: fx.Node, weight: str) -> bool:
    """Whether an einsum is ``[..., i] times a matrix -> [..., o]``, its matrix written as ``weight``: "oi" or "io".

    ``torch.einsum("bsi,oi->bso", x, w)`` is a linear, and with "io" a matrix product. The letters do not matter.
    """
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return False
    terms, _, result = equation.replace(" ", "").replace("...", ".").partition("->")
    x, _, w = terms.partition(",")
    if "->" not in equation:
        seen = Counter(x + w)
        result = "".join(sorted(letter for letter, count in seen.items() if count == 1))  # "." sorts before letters
    if len(w) != 2 or "." in w or not x or not result:
        return False
    o, i = (w[weight.index(letter)] for letter in "oi")
    rows = x[:-1]
    if x[-1] != i or result != rows + o or len({*rows, o, i}) != len(rows) + 2:
        return False
    shapes = [operand.meta["val"].shape for operand in operands if isinstance(operand, fx.Node)]
    return len(shapes) == 2 and len(shapes[1]) == 2 and shapes[0][-1] == shapes[1][weight.index("i")]
