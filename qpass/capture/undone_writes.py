"""Writes of a trace to the caller's own tensors, undone after it.

`torch.export` computes with fake tensors in the place of parameters and buffers. It takes a tensor that is a plain
attribute as it is, such as the counter and the keys of a cache object. So a trace writes to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qpass.torch_private import OpOverload, TorchDispatchMode, disable_current_modes, tree_leaves


@contextmanager
def writes_undone() -> Iterator[None]:
    """Undo at the end all writes inside to tensors that hold values."""
    writes = _Writes()
    try:
        with writes:
            yield
    finally:
        with torch.no_grad():
            for tensor, before in writes.before.values():
                tensor.copy_(before)


class _Writes(TorchDispatchMode):
    """Copies a tensor before its first write. It sees calls before the modes of the trace take them apart."""

    supports_higher_order_operators = True  # cond and its like pass through

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Yes: with a mode of a user's around it, Dynamo does not look into the branches of ``torch.cond``."""
        return True

    def __init__(self) -> None:
        super().__init__()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # by storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        writes = isinstance(func, OpOverload) and func._schema.is_mutable
        entries = func._schema.arguments if writes else ()
        given = [*zip(entries, args, strict=False), *((e, kwargs[e.name]) for e in entries if e.name in kwargs)]
        for entry, value in given:
            if entry.alias_info is not None and entry.alias_info.is_write:
                for tensor in filter(_holds_values, tree_leaves(value)):
                    self._keep(tensor)
        return func(*args, **kwargs)

    def _keep(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.before:
            with disable_current_modes():
                whole = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
                self.before[storage._cdata] = whole, whole.clone()


def _holds_values(value: Any) -> bool:
    return type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided and not value.is_meta
