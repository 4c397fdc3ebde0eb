"""Operator libraries: `quantized_decomposed`, and what its operators are made of."""

from __future__ import annotations

from qpass.ops.decomposed import quantized_decomposed

__all__ = ["quantized_decomposed"]
