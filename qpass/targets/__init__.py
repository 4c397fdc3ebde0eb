"""Targets: which int8 kernels a machine has, what they take, and how weights are packed for them."""
