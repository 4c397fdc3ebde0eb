"""Models that run for a measurement and are restored after it: their buffers, caches and counters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qpass.backend.compilations import modules_of
from qpass.torch_private import tree_leaves, tree_map_only

_REGISTERED = ("_parameters", "_buffers", "_modules")


@contextmanager
def unchanged(*programs: Any) -> Iterator[None]:
    """Afterwards, buffers and tensors that are plain attributes are the same tensors with the same values as before.

    Args:
        programs: models, compiled ones too, and functions that close over models.
    """
    modules = {module for program in programs for model in modules_of(program) for module in model.modules()}
    places = [
        (holder, name, value) for module in modules for holder in (module._buffers, vars(module))
        for name, value in list(holder.items()) if name not in _REGISTERED
    ]  # fmt: skip
    leaves = [leaf for _, _, value in places for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    values = {id(leaf): leaf for leaf in leaves if leaf.layout == torch.strided and not leaf.is_meta}
    copies = {key: value.clone() for key, value in values.items()}
    try:
        yield
    finally:
        for holder, name, value in places:
            now = holder.get(name)
            if now is not value and (isinstance(now, Tensor) or isinstance(value, Tensor)):
                holder[name] = value
        with torch.no_grad():
            for key, copy in copies.items():
                if not torch.equal(values[key], copy):
                    values[key].copy_(copy)


def copied(batch: Any) -> Any:
    """A batch of tensors of its own, for a model that writes to its inputs; what shares a tensor still does."""
    seen: dict[int, Tensor] = {}
    return tree_map_only(Tensor, lambda x: seen.setdefault(id(x), x.detach().clone()), batch)
