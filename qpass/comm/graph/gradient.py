"""The gradient that a sum leaves a backward graph as. Such a sum has the same elements at every step.

    sum -> view, cast, slice, scale, add, another sum -> output 3            "output_3"
    sum -> ... -> copy_(input 5, .)                                          "input_5"

What a matmul reads does not count: an element of an activation's gradient is that of another sample at the next step.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import torch
from torch import fx

from qpass.comm.graph.collective import SUMS, WAIT, ops
from qpass.ir.match import normalized
from qpass.ir.rule import require
from qpass.torch_private import tree_leaves

aten = torch.ops.aten

_KEEP: frozenset[Any] = frozenset({
    aten.view, aten.reshape, aten._unsafe_view, aten.flatten, aten.unflatten, aten.permute, aten.transpose, aten.t,
    aten.squeeze, aten.unsqueeze, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind,
    operator.getitem, aten.cat, aten.stack, aten.clone, aten.alias, aten.detach, aten.constant_pad_nd,
    aten._to_copy, torch.ops.prims.convert_element_type, aten.neg, aten.add, aten.sub,
    WAIT.overloadpacket, ops.all_gather_into_tensor,
})  # fmt: skip
"""Operators whose results have an element for each of the sum's, linear in it."""

_SCALE: frozenset[Any] = frozenset({aten.mul, aten.div})
_SUM: frozenset[Any] = frozenset({ops.all_reduce, ops.reduce_scatter_tensor})


def gradient_name(total: fx.Node, gradients: Collection[int] | None = None) -> str:
    """The name of the gradient that ``total`` leaves its graph as, the first where it is a bucket of several.

    ``gradients`` are the outputs that are gradients of parameters; None where all are.

    Raises:
        Refusal: it does not, or something else reads it, too.
    """
    inputs = total.graph.find_nodes(op="placeholder")
    names, reached = [], [total]
    for value in reached:  # which grows meanwhile
        for reader in value.users:
            if reader.op == "output":
                places = [place for place, each in enumerate(tree_leaves(reader.args[0])) if each is value]
                others = [place for place in places if gradients is not None and place not in gradients]
                require(
                    not others,
                    f"its sum leaves as output {min(others, default=0)}, which is not the gradient of a weight",
                )
                names += [(place, f"output_{place}") for place in places]
            elif reader.target is aten.copy_.default and reader.args[0] in inputs and reader.args[1] is value:
                place = inputs.index(reader.args[0])
                names.append((place, f"input_{place}"))
            else:
                require(_is_linear(reader), f"its sum is read by {reader.name}")
                reached += [reader] if reader not in reached else []
    require(names, "its sum is not read")
    return min(names)[1]


def _is_linear(reader: fx.Node) -> bool:
    target: Any = reader.target
    operation = getattr(target, "overloadpacket", target)  # Inductor writes some calls without their overload
    if operation in _SCALE:
        return isinstance(reader.args[1], (int, float)) and "rounding_mode" not in reader.kwargs
    if operation in _SUM:
        return normalized(reader)["reduce_op"] in SUMS
    return operation in _KEEP
