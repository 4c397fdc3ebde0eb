"""Compress the collectives of a graph that somebody traced."""

from qpass.comm.graph.compress import CompressCollectives, compress

__all__ = ["CompressCollectives", "compress"]
