"""torch.ops.qpass_decomposed: the operators of ``quantized_decomposed`` under the same names, free of its defects.

Each is its kernel in plain ATen, registered for every dispatch key at once (CompositeImplicitAutograd). So eager,
Meta, autograd and every backend of ``torch.compile`` run one and the same code: they cannot disagree about a shape, a
dtype, an error or a code, and Inductor fuses the arithmetic into its neighbours without knowing the operators.
"""

from __future__ import annotations

import torch

from qpass.ops.decomposed import OPERATORS

NAMESPACE = "qpass_decomposed"

_library = torch.library.Library(NAMESPACE, "DEF")  # kept alive: its definitions go with it

for _name, (_schema, _kernel) in OPERATORS.items():
    _library.define(_name + _schema)
    _library.impl(_name, _kernel, "CompositeImplicitAutograd")

quantized_decomposed = torch.ops.qpass_decomposed
