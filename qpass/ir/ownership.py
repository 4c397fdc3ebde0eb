"""Whose tensors a graph module holds: its own, or those of the module that it was made from.

Passes share every tensor between a graph and its copies, since a pass has no reason to copy weights. Where a graph
becomes a value of its own, as the result of ``convert`` does, the tensors that it still shares are copied here. Names
and views that shared memory inside the graph share it in the copy, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, fx

from qpass.ir.alias import written_nodes
from qpass.ir.attributes import get_constant
from qpass.ir.origins import derived_constants
from qpass.ir.regions import regions
from qpass.torch_private import is_traceable_wrapper_subclass

BORROWED_KEY = "qpass_borrowed"
ALIGNMENT = 16
"""No element of a dtype is larger, in bytes."""


def own_tensors(
    gm: torch.nn.Module, shared_with: Iterable[Tensor] | None = None, values: Mapping[int, Tensor] | None = None
) -> None:
    """Give ``gm`` parameters and buffers of its own; what shared memory inside it still does.

    Args:
        gm: the module; its tensors are replaced, and none is written to.
        shared_with: only what shares memory with one of these tensors is copied; None: everything is.
        values: ``id(tensor) -> other``: the copy is one of ``other``, which has the form of ``tensor``.
    """
    memory = None if shared_with is None else set(map(_memory, shared_with))
    found = [
        (tensors, name, (values or {}).get(id(tensor), tensor))
        for module in gm.modules() for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items() if tensor is not None and (memory is None or _memory(tensor) in memory)
    ]  # fmt: skip
    own = _copies([tensor for _, _, tensor in found])
    for tensors, name, tensor in found:
        tensors[name] = own[id(tensor)]  # type: ignore[assignment]


def tensors_in(gm: torch.nn.Module) -> list[Tensor]:
    """All parameters and buffers of ``gm``, and those that it borrowed (:func:`own_written`)."""
    return [*gm.parameters(), *gm.buffers(), *(borrowed for _, borrowed in gm.meta.get(BORROWED_KEY, ()))]  # type: ignore[operator, union-attr]


def own_written(gm: fx.GraphModule) -> None:
    """Give ``gm`` copies of the tensors that its graphs write to, so that running it changes none of the caller's.

    The caller's own are kept in ``meta``; :func:`borrowed` has them.
    """
    targets = [
        value
        for region in regions(gm)
        for node in written_nodes(region.graph)
        if node.op == "get_attr" and isinstance(value := get_constant(region, str(node.target)), Tensor)
    ]
    memory = set(map(_memory, targets))
    if not memory:
        return
    before = [tensor for tensor in [*gm.parameters(), *gm.buffers()] if _memory(tensor) in memory]
    places = {name: tensor for name, tensor in _named(gm) if _memory(tensor) in memory}
    own_tensors(gm, before)
    after = dict(_named(gm))
    gm.meta[BORROWED_KEY] = list({id(after[name]): (after[name], tensor) for name, tensor in places.items()}.values())


def borrowed(gm: fx.GraphModule) -> dict[int, Tensor]:
    """``id(own copy) -> the caller's tensor``, for what :func:`own_written` replaced."""
    return {id(own): theirs for own, theirs in gm.meta.get(BORROWED_KEY, ())}


def forget_origin(gm: fx.GraphModule) -> None:
    """Let nothing in ``gm`` point to the tensors of the module that it was made from, or follow from them."""
    gm.meta.pop(BORROWED_KEY, None)
    for region in regions(gm):
        derived_constants(region).clear()


def _named(gm: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from gm.named_parameters(remove_duplicate=False)
    yield from gm.named_buffers(remove_duplicate=False)


def _memory(tensor: Tensor) -> int:
    """The identity of what a tensor keeps its values in: its storage, or itself where it has none of its own."""
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return id(tensor)
    return tensor.untyped_storage()._cdata


def _copies(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """``id(tensor) -> its copy``; copies of tensors that overlap in memory overlap in the same way."""
    distinct = {id(tensor): tensor for tensor in tensors}
    by_memory: defaultdict[int, list[Tensor]] = defaultdict(list)
    for tensor in distinct.values():
        by_memory[_memory(tensor)].append(tensor)
    own: dict[int, Tensor] = {}
    for group in by_memory.values():
        for overlapping in _overlapping(group) if len(group) > 1 else [group]:
            for tensor, copied in zip(overlapping, _copied(overlapping), strict=True):
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                own[id(tensor)] = torch.nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
    return own


def _copied(tensors: list[Tensor]) -> list[Tensor]:
    """Copies of tensors of one storage whose extents overlap, in one storage as large as they need."""
    if len(tensors) == 1:
        return [tensors[0].detach().clone()]
    low = min(_extent(tensor)[0] for tensor in tensors) // ALIGNMENT * ALIGNMENT
    high = max(_extent(tensor)[1] for tensor in tensors)
    first = tensors[0]
    content = torch.empty(0, dtype=torch.uint8, device=first.device)
    content.set_(first.untyped_storage(), low, (high - low,), (1,))
    storage = content.clone().untyped_storage()
    return [
        torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            storage, (_extent(tensor)[0] - low) // tensor.element_size(), tensor.shape, tensor.stride()
        )
        for tensor in tensors
    ]


def _overlapping(tensors: list[Tensor]) -> list[list[Tensor]]:
    """The tensors of one storage in groups, so that no two groups have a byte in common."""
    groups: list[list[Tensor]] = []
    reach = 0
    for tensor in sorted(tensors, key=_extent):
        low, high = _extent(tensor)
        if groups and low < reach:
            groups[-1].append(tensor)
        else:
            groups.append([tensor])
        reach = max(reach, high)
    return groups


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one behind its last."""
    low = int(tensor.storage_offset()) * tensor.element_size()
    if tensor.numel() == 0:
        return low, low
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + (last + 1) * tensor.element_size()
