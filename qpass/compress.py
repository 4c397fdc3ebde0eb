"""Compress the collectives of a graph that somebody traced."""

from qpass.comm.graph.compress import compress
from qpass.comm.graph.inductor_pass import CompressCollectives

__all__ = ["CompressCollectives", "compress"]
