"""Operator libraries: what graphs carry (`graph_ops`), and the corrected operators (`quantized_decomposed`)."""

from __future__ import annotations

from qpass.arithmetic.corrected import quantized_decomposed
from qpass.arithmetic.decomposed import graph_ops

__all__ = ["graph_ops", "quantized_decomposed"]
