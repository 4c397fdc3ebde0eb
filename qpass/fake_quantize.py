"""Tensors in, the values that their codes stand for out: modules that train a network for rounding."""

from qpass.spec.fake_quantize import *  # noqa: F403  (a door: the room lists its public names once)
from qpass.spec.fake_quantize import __all__ as __all__
