"""Where the constants of a graph come from: an argument of the call, a tensor that stays the same, other constants.

Compiled code serves every model of one kind with the weights that *this* call brings, so a constant is known by its
name and never by the tensor that stood there when the graph was made: passes replace tensors by others of equal value,
and two names may share one. Names are kept by all copies of a graph, and a name is never given out twice.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch

ORIGINS_KEY = "qpass_origins"
DERIVED_KEY = "qpass_derived"

Origin = int | torch.Tensor


@dataclass(frozen=True)
class Derived:
    """``compute(*sources) -> tensor``: how the constant of this name follows from others of the same graph module.

    ``form``: what is computed, as a value. Constants of equal forms are one; None is equal to nothing.
    """

    sources: tuple[str, ...]
    compute: Callable[..., torch.Tensor]
    form: Hashable = None


def origins(gm: torch.nn.Module) -> dict[str, Origin]:
    """What the captured constants of ``gm`` stand for: the argument at a position of Dynamo's call, or that tensor.

    A name stays here when the graph does not read it any more, since others may be derived from it.
    """
    found: dict[str, Origin] = _meta(gm).setdefault(ORIGINS_KEY, {})
    return found


def derived_constants(gm: torch.nn.Module) -> dict[str, Derived]:
    """Constants of ``gm`` that follow from others, in the order in which they can be computed."""
    found: dict[str, Derived] = _meta(gm).setdefault(DERIVED_KEY, {})
    return found


def is_known(gm: torch.nn.Module, name: str) -> bool:
    """Whether ``name`` stands or stood for a constant of ``gm``."""
    meta = getattr(gm, "meta", {})
    return name in meta.get(ORIGINS_KEY, ()) or name in meta.get(DERIVED_KEY, ())


def move_origin(source: torch.nn.Module, name: str, gm: torch.nn.Module, new: str) -> None:
    """The constant ``name`` of ``source`` is from now on also the constant ``new`` of ``gm``."""
    found = getattr(source, "meta", {}).get(ORIGINS_KEY, {})
    if name in found:
        origins(gm)[new] = found[name]


def _meta(gm: torch.nn.Module) -> dict[str, Any]:
    meta: Any = gm.meta  # a GraphModule's
    return meta
