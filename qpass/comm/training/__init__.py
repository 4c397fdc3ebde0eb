"""Compressed gradients and parameters of DDP and FSDP2, which keep their collectives out of graphs."""
