"""Tensors as bytes for the wire, and back: formats, codecs, their kernels and operators."""
