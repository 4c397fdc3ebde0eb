"""torch.ops.qpass_decomposed: the operators of ``quantized_decomposed`` under the same names, free of its defects.

Each is its kernel in plain ATen, registered for every dispatch key at once (CompositeImplicitAutograd). So eager,
Meta, autograd and every backend of ``torch.compile`` run one and the same code: they cannot disagree about a shape, a
dtype or an error, and Inductor fuses the arithmetic into its neighbours without knowing the operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic.decomposed import OPERATORS, graph_ops

NAMESPACE = "qpass_decomposed"


class _Convert(torch.autograd.Function):
    """Torch's operator, which Inductor never fuses, with the gradient that it lacks."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = input.dtype
        result: Tensor = graph_ops.convert_element_type.no_fuse(input.detach(), dtype)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


_library = torch.library.Library(NAMESPACE, "DEF")  # kept alive: its definitions go with it

for _name, (_schema, _kernel) in OPERATORS.items():
    _library.define(_name + _schema)
    _implementation = _Convert.apply if _name == "convert_element_type.no_fuse" else _kernel
    _library.impl(_name, _implementation, "CompositeImplicitAutograd")

quantized_decomposed = torch.ops.qpass_decomposed
