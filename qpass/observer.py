"""Tensors in, qparams out: modules that watch a tensor and choose its scale and zero point."""

from qpass.spec.observers import *  # noqa: F403  (a door: the room lists its public names once)
from qpass.spec.observers import __all__ as __all__
