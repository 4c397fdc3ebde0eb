"""Decide in which dtype each operation that stays in floating point computes; nothing is changed but ``meta``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.graph.constants import Constants
from qpass.graph.record import record_of, set_record
from qpass.passes.annotate import ISLAND
from qpass.passes.expand_attention import EXPAND, may_expand
from qpass.passes.frame import Pass
from qpass.rewrite.views import carried

aten = torch.ops.aten
COMPUTE_DTYPE = "qpass_compute_dtype"
"""``meta`` key: the dtype that an operation computes in once ``convert`` has placed the casts."""
AS_IT_COMES = "as it comes"
"""Instead of a dtype: the operation moves values and takes them in whichever dtype they have."""

MULTIPLIES: frozenset[Any] = frozenset({
    aten.linear.default, aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default,
    aten.baddbmm.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.conv_transpose1d.default,
    aten.conv_transpose2d.input, aten.conv_transpose3d.input, aten.scaled_dot_product_attention.default,
    aten.embedding.default, aten.einsum.default, aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
})  # fmt: skip
"""Multiply-accumulate operations: faster in bfloat16, with float32 accumulation inside."""

FOLLOWS: frozenset[Any] = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar, aten.add.Scalar, aten.div.Scalar,
    aten.neg.default, aten.relu.default, aten.gelu.default, aten.silu.default, aten.sigmoid.default, aten.tanh.default,
    aten.hardswish.default, aten.hardtanh.default, aten.hardsigmoid.default, aten.stack.default, aten.cat.default,
    aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.where.self,
    aten.masked_fill.Scalar, aten.repeat_interleave.self_int, aten.index_select.default, aten.div.Tensor,
    aten.roll.default, aten.repeat.default, aten.expand_as.default, aten.softmax.int,
})  # fmt: skip
"""Element by element: computed in bfloat16 as soon as one operand is."""


@dataclass(frozen=True)
class AssignComputeDtype(Pass):
    """Multiply-accumulates and what hangs on them in ``dtype``; statistics, sums and unknown operations in float32

    A quantized operation computes in float32 and hands ``dtype`` on to the float operations behind it. With
    ``expand_attention``, attention is marked to run as two matrix products.
    """

    dtype: torch.dtype
    expand_attention: bool = False

    def run(self, gm: fx.GraphModule) -> int:
        constants = Constants(gm)
        low: set[fx.Node] = set()
        before = {node: node.meta.get(COMPUTE_DTYPE) for node in gm.graph.nodes}
        for node in gm.graph.nodes:
            if node.op != "call_function" or node in constants or not _is_float32(node):
                if node.op == "call_function" and _is_list(node) and self._wants(node, low):
                    low.add(node)
                    node.meta[COMPUTE_DTYPE] = self.dtype
                elif node.op == "call_function" and any(n in low for n in node.all_input_nodes):
                    node.meta[COMPUTE_DTYPE] = torch.float32
                continue
            if ISLAND in node.meta:
                low.add(node)
                node.meta[COMPUTE_DTYPE] = torch.float32
                continue
            wants = self._wants(node, low)
            node.meta[COMPUTE_DTYPE] = self.dtype if wants else torch.float32
            if len(carried(node)) == 1:
                node.meta[COMPUTE_DTYPE] = AS_IT_COMES
            if wants:
                low.add(node)
                if self.expand_attention and may_expand(node):
                    node.meta[EXPAND] = True
            record = record_of(node)
            if record is not None and wants:
                set_record(node, record.but(compute_dtype=self.dtype))
        return sum(node.meta.get(COMPUTE_DTYPE) != dtype for node, dtype in before.items())

    def _wants(self, node: fx.Node, low: set[fx.Node]) -> bool:
        if node.target in MULTIPLIES:
            return True
        follows = node.target in FOLLOWS or bool(carried(node)) or getattr(node.target, "__name__", "") == "getitem"
        return follows and any(source in low for source in node.all_input_nodes)


def _is_float32(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype == torch.float32


def _is_list(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, (list, tuple)) and any(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in val)
