"""Targets: which low-precision kernels a device has, what they take, and how weights are packed for them."""

from qpass.targets.registry import AUTO, for_device, for_graph, get
from qpass.targets.target import Kernel, Output, Target
from qpass.targets.x86.target import X86

__all__ = ["AUTO", "X86", "Kernel", "Output", "Target", "for_device", "for_graph", "get"]
