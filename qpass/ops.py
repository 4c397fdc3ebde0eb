"""Operator libraries: what graphs carry (`graph_ops`), and the corrected operators (`quantized_decomposed`)."""

from qpass.arithmetic import (
    graph_ops,
    quantized_decomposed,
)

__all__ = ["graph_ops", "quantized_decomposed"]
