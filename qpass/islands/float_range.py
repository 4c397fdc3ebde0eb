"""Values that a smaller floating dtype would turn into infinities, or whole numbers that it would round."""

from __future__ import annotations

import math
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import Tensor, fx

from qpass import torch_private
from qpass.ir.alias import written_nodes
from qpass.ir.attributes import get_constant
from qpass.islands.views import carried
from qpass.torch_private import tree_leaves

aten = torch.ops.aten
WIDE = (torch.float32, torch.float64)

SMALL_RESULTS: frozenset[Any] = frozenset({
    aten.softmax.int, aten._softmax.default, aten.sigmoid.default, aten.tanh.default, aten.hardtanh.default,
    aten.hardsigmoid.default, aten.erf.default, aten.sin.default, aten.cos.default, aten.atan.default,
    aten.sign.default, aten.log.default, aten.log1p.default, aten.log2.default, aten.sqrt.default, aten.rsqrt.default,
    aten.layer_norm.default, aten.group_norm.default, aten.batch_norm.default, aten.instance_norm.default,
    aten.rms_norm.default, aten.native_layer_norm.default, aten.native_group_norm.default, aten.relu6.default,
    aten._native_batch_norm_legit_no_training.default,
})  # fmt: skip
"""Results are small however large operands are."""

SENSITIVE: frozenset[Any] = frozenset({
    aten.sin.default, aten.cos.default, aten.tan.default, aten.floor.default, aten.ceil.default, aten.round.default,
    aten.round.decimals, aten.trunc.default, aten.frac.default, aten.remainder.Scalar, aten.remainder.Tensor,
    aten.fmod.Scalar, aten.fmod.Tensor, aten.floor_divide.default, aten.div.Tensor_mode, aten.div.Scalar_mode,
    aten.polar.default, aten.var.default, aten.var.dim, aten.var.correction, aten.std.default, aten.std.dim,
    aten.std.correction, aten.var_mean.correction, aten.var_mean.dim, aten.diff.default,
})  # fmt: skip
"""A rounding relative to the operand may change the whole result: an angle of 1000 is off by 2 in bfloat16."""

KEEPS_WHOLE: frozenset[Any] = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.rsub.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.neg.default,
    aten.cat.default, aten.stack.default, aten.where.self, aten.repeat.default, aten.expand_as.default,
    aten.index_select.default, aten.repeat_interleave.self_int, aten.roll.default, aten.cumsum.default,
    aten.masked_fill.Scalar, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int,
})  # fmt: skip
"""Whole numbers are still in the result of whole numbers and others; not of products, whose error is relative."""


def beyond(gm: fx.GraphModule, dtype: torch.dtype, rounded: Set[fx.Node], bounded: Set[fx.Node]) -> Iterator[fx.Node]:
    """The float32 and float64 values that may be finite and yet larger than any number of ``dtype``.

    float32 ends 0.4 % above bfloat16. A value that is computed from smaller ones lands there by accident alone; one
    that is written down (the smallest float32, as a mask has it) lies there often. So what comes from outside, what is
    stored, numbers in the graph, and what operations make of those count.

    Args:
        rounded: operations that compute in ``dtype``.
        bounded: operations whose results are sums of products.
    """
    found: set[fx.Node] = set()
    changing = written_nodes(gm.graph)
    for node in gm.graph.nodes:
        wide = node not in rounded and any(value in WIDE for value in dtypes(node))
        if wide and _is_beyond(gm, node, dtype, found, bounded, node in changing):
            found.add(node)
            yield node


def _is_beyond(
    gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype, found: Set[fx.Node], bounded: Set[fx.Node], changing: bool
) -> bool:
    is_weight = bool(node.users) and all(_multiplies(user, node, bounded) for user in node.users)
    if node.op == "get_attr" and is_weight and not changing:
        return False  # a weight that large makes infinities in float32 as well
    if node.op in ("get_attr", "placeholder") or changing:
        return True
    if node in bounded or node.target in SMALL_RESULTS:
        return False
    if node.op == "call_function" and not isinstance(node.target, torch_private.OpOverload):
        is_item = getattr(node.target, "__name__", "") == "getitem"
        return not is_item or any(source in found for source in node.all_input_nodes)
    if node.target is aten.embedding.default:
        return _holds_beyond(gm, node.args[0], dtype)
    if exceeds(node, dtype) or node.target is aten.nan_to_num.default:  # which writes the largest number by default
        return True
    return any(source in found for source in node.all_input_nodes)


def _multiplies(user: fx.Node, weight: fx.Node, products: Set[fx.Node]) -> bool:
    """Whether ``weight`` is the second factor of a sum of products, and nothing else in it."""
    return user in products and len(user.args) > 1 and user.args[1] is weight and user.args[0] is not weight


def _holds_beyond(gm: fx.GraphModule, table: Any, dtype: torch.dtype) -> bool:
    """Whether a table that is looked up holds such values; one that is computed may."""
    while table.op == "call_module":  # observed
        table = table.args[0]
    value = get_constant(gm, str(table.target)) if table.op == "get_attr" else None
    if not isinstance(value, Tensor) or value.is_meta or value.layout != torch.strided:
        return True
    finite = torch.where(value.isfinite(), value.detach(), 0)
    return bool(value.numel()) and float(finite.abs().amax()) > torch.finfo(dtype).max


def exceeds(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a number among the arguments is finite, and larger than any of ``dtype``."""
    leaves = [leaf for leaf in tree_leaves((node.args, node.kwargs)) if type(leaf) in (int, float)]
    return any(torch.finfo(dtype).max < abs(value) < math.inf for value in leaves)


def shifts(node: fx.Node, dtype: torch.dtype) -> bool:
    """Whether a number is added beside which ``dtype`` keeps no fraction of the rest: -10000 of scores in a softmax."""
    offset = node.args[1] if node.target in _ADDS else 0
    return isinstance(offset, (int, float)) and abs(offset) >= 1 / torch.finfo(dtype).eps


def read_exactly(graph: fx.Graph, follows: Set[Any], multiplies: Set[Any]) -> set[fx.Node]:
    """The operations that feed a ``SENSITIVE`` one through moves and elementwise operations, the last product included:
    ``sin(position * frequency)``, ``cos(transpose(frequency @ position))``, ``floor(x)``."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "call_function":
            continue
        passes = node.target in follows or carried(node) or getattr(node.target, "__name__", "") == "getitem"
        to_whole = node.target is aten.to.dtype and node.args[1] in _WHOLE
        if node.target in SENSITIVE or to_whole or (node in found and passes and node.target not in multiplies):
            found.update(node.all_input_nodes)
    return found


def whole_numbers(gm: fx.GraphModule, dtype: torch.dtype, multiplies: Set[Any]) -> set[fx.Node]:
    """The floating values that hold whole numbers which ``dtype`` may not hold: positions, counts, times."""
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if not any(value in WIDE for value in dtypes(node)):
            continue
        if node.op == "get_attr":
            if _counts(get_constant(gm, str(node.target)), dtype):
                found.add(node)
        elif node.op == "call_function":
            made = node.target in _CASTS and any(d in _WHOLE for s in node.all_input_nodes for d in dtypes(s))
            made = made or str(node.target).startswith("aten.arange")
            keeps = node.target in KEEPS_WHOLE or carried(node) or node.target in _CASTS
            keeps = keeps or getattr(node.target, "__name__", "") == "getitem"
            wide = [source for source in node.all_input_nodes if any(value in WIDE for value in dtypes(source))]
            keeps_all = node.target in multiplies or node.target in _PRODUCTS
            factors = [leaf for leaf in node.args if isinstance(leaf, float)]
            all_whole = all(source in found for source in wide) and all(factor.is_integer() for factor in factors)
            if made or (keeps and any(source in found for source in wide)) or (keeps_all and wide and all_whole):
                found.add(node)
    return found


def _counts(value: Any, dtype: torch.dtype) -> bool:
    """Whether a buffer holds whole numbers that ``dtype`` does not; a mask of two values is none."""
    if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter) or value.layout != torch.strided:
        return False
    if value.is_meta or not value.numel() or not value.is_floating_point():
        return False
    if not 2 / torch.finfo(dtype).eps < float(value.abs().amax()) <= 2 / torch.finfo(torch.float32).eps:
        return False
    whole = torch.equal(value, value.round()) and not torch.equal(value, value.to(dtype).to(value.dtype))
    return whole and len(value.unique()) > 2


_WHOLE = (torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)
_ADDS = (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar)
_PRODUCTS = (aten.mul.Tensor, aten.mul.Scalar)
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device)


def dtypes(node: fx.Node) -> list[torch.dtype]:
    """The dtypes of the tensors that a node yields."""
    return [value.dtype for value in tree_leaves(node.meta.get("val")) if isinstance(value, Tensor)]
