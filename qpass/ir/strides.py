"""The strides that a node's result has in the float model, where a kernel returns it with other strides.

While passes run, ``meta["val"]`` of every node is what the float model has there, strides included. A kernel that
writes channels-last where the float operation did not, or one that hands out a part of a wider result, keeps that
promise for ``val`` and says beside it what it really returns. ``passes/keep_strides.py`` brings the two together where
strides can be seen; after it ``val`` has the real strides again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qpass.ir.fake import fake_mode_of, terms

LAID_OUT = "qpass_laid_out"
"""``meta`` key: the fake value that a node really has, where its strides are not those of ``meta["val"]``."""


def stand_for(node: fx.Node, old: fx.Node) -> None:
    """Give the tensor of ``node``, which takes the place of ``old``, the strides that ``old`` has."""
    val, seen = node.meta.get("val"), old.meta.get("val")
    mode = fake_mode_of(node.graph)
    if mode is None or not isinstance(val, Tensor) or not isinstance(seen, Tensor) or same_strides(val, seen):
        return
    node.meta[LAID_OUT] = val
    with mode:
        node.meta["val"] = torch.empty_strided(val.shape, seen.stride(), dtype=val.dtype, device=val.device)


def same_strides(one: Any, other: Any) -> bool:
    """Whether two values, or lists of values, have equal strides; a value that is not a strided tensor has none."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return all(map(same_strides, one, other))
    tensors = [value for value in (one, other) if isinstance(value, Tensor) and value.layout == torch.strided]
    return len(tensors) < 2 or terms(one.stride()) == terms(other.stride())
