"""Kernels and packed weights, hidden from AOTAutograd and Inductor under names of our own until Inductor lowers them.

AOTAutograd cannot hold a packed weight, and Inductor wants it to be a constant. Inductor's patterns would rewrite the
kernels, although every rounding of the graph was decided before. So neither may recognise them::

    onednn.qlinear(x, get_attr packed)  ->  qpass.onednn_qlinear(x, packed_weight("7"))  ->  AOTAutograd, patterns
        ->  lowered as onednn.qlinear(x, constant packed)
"""

from __future__ import annotations

import functools
import itertools
import re
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qpass import torch_private
from qpass.ir.attributes import get_constant
from qpass.ir.regions import regions

_library = torch.library.Library("qpass", "FRAGMENT")
_library.define("packed_weight(int key, SymInt[] size, ScalarType dtype) -> Tensor")
_packed: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
_keys = itertools.count()


@torch.library.register_fake("qpass::packed_weight", lib=_library)
def _packed_weight(key: int, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype)


def hide(gm: fx.GraphModule) -> list[Tensor]:
    """Rename the kernels and packed weights of ``gm`` and its regions, in place; the packed weights found.

    They must live until the graph is compiled, and the compiled graph must not be cached: their keys are of this
    process.
    """
    _register_packed_weight()
    found: dict[int, Tensor] = {}
    keys: dict[int, int] = {}
    for region in regions(gm):
        for node in list(region.graph.nodes):
            if node.op == "get_attr":
                value = get_constant(region, node.target)
                if isinstance(value, Tensor) and value.layout != torch.strided:
                    found[id(value)] = value
                    _name(node, value, keys.setdefault(id(value), next(_keys)))
            elif getattr(node.target, "namespace", "") == "onednn":
                node.target = _alias(node.target)
        region.recompile()
    return list(found.values())


def _name(node: fx.Node, value: Tensor, key: int) -> None:
    _packed[key] = value
    with node.graph.inserting_before(node):
        name = node.graph.call_function(torch.ops.qpass.packed_weight.default, (key, list(value.shape), value.dtype))
    name.meta = dict(node.meta)
    node.replace_all_uses_with(name)
    node.graph.erase_node(node)


@functools.cache
def _register_packed_weight() -> None:
    from qpass.torch_private import V, register_lowering

    @register_lowering(torch.ops.qpass.packed_weight.default, type_promotion_kind=None)
    def lower_packed_weight(key: int, size: Sequence[int], dtype: torch.dtype) -> Any:
        constant = V.graph.add_tensor_constant(_packed[key], f"packed_weight_{key}")
        _share_constants(V.graph)
        return constant


@functools.cache
def _alias(kernel: torch_private.OpOverload) -> torch_private.OpOverload:
    """An operator that is lowered as ``kernel``. Until then nothing but its shapes is known.

    Where ``kernel`` writes to an operand and returns it, the alias is functional: the operand is copied when the
    graph reads it elsewhere.
    """
    from qpass.torch_private import V, lowerings, register_lowering

    schema = kernel._schema
    name = "_".join(filter(None, (*schema.name.split("::"), schema.overload_name)))
    _library.define(name + re.sub(r"\(\w!\)", "", str(schema)[str(schema).index("(") :]))
    written = [i for i, a in enumerate(schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    names = [a.name for a in schema.arguments]
    adds_in_place = names.index("other") if "other" in names else None  # where the post-op is "sum"; no schema says so
    alias: torch_private.OpOverload = getattr(torch.ops.qpass, name).default

    @torch.library.register_fake(f"qpass::{name}", lib=_library)
    def fake(*args: Any) -> Any:
        return kernel(*(torch.empty_like(a) if i in written or i == adds_in_place else a for i, a in enumerate(args)))

    @register_lowering(alias, type_promotion_kind=None)
    def lower(*args: Any) -> Any:
        operands = list(args)
        for index in (adds_in_place,) if adds_in_place is not None and "sum" in args else written:
            if not _is_last_use(V.graph.current_node, index):
                operands[index] = lowerings[torch.ops.aten.clone.default](operands[index])
        result = lowerings[kernel](*operands)
        _share_constants(V.graph)
        return result

    return alias


def _share_constants(graph: Any) -> None:
    """Give the constants of a region to the whole graph: Inductor forgets them, and they would be None in its code."""
    root = graph
    while (parent := getattr(root, "parent", None)) is not None:
        root = parent
    if root is not graph:
        root.constants.update(graph.constants)


def _is_last_use(node: fx.Node, index: int) -> bool:
    """Whether nothing after ``node`` reads the memory of its operand, and the operand was computed in this graph."""
    base: Any = node.args[index]
    while _is_view(base):
        base = base.args[0]
    is_fresh = isinstance(base.target, torch_private.OpOverload)
    return is_fresh and not _is_read_behind(base, node)


def _is_read_behind(value: fx.Node, node: fx.Node) -> bool:
    return any(user > node or (_is_view(user) and _is_read_behind(user, node)) for user in value.users)


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch_private.OpOverload):
        return False
    return any(r.alias_info is not None for r in target._schema.returns)
