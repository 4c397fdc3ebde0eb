"""Decide in which dtype each operation that stays in floating point computes; nothing is changed but ``meta``."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.ir.alias import written_nodes
from qpass.ir.constants import Constants
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.observer import is_observer
from qpass.ir.record import record_of, set_record
from qpass.islands.float_range import beyond, exceeds, read_exactly, shifts, whole_numbers
from qpass.islands.views import carried
from qpass.quantize.passes.annotate import ISLAND
from qpass.quantize.passes.expand_attention import EXPAND, may_expand
from qpass.spec import PerChannel

aten = torch.ops.aten
COMPUTE_DTYPE = "qpass_compute_dtype"
"""``meta`` key: the dtype that an operation computes in once ``convert`` has placed the casts."""
BEYOND = "qpass_beyond"
"""``meta`` key: finite values may lie beyond the largest number of that dtype, as those of a mask that is full of the
smallest float32; a cast brings them to that number, since an infinity in their place makes NaN of a row that is all
masked. Infinities stay."""
ROUNDED_ROWS = "qpass_rounded_rows"
"""``meta`` key on a product whose weight alone is quantized: the dtype that its rows are rounded to."""
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

RELATIVE: frozenset[Any] = frozenset({
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Scalar, aten.div.Tensor, aten.sigmoid.default, aten.tanh.default,
    aten.hardsigmoid.default, aten.softmax.int, aten.index_select.default,
})  # fmt: skip
"""Operations whose result may be rounded although an operand holds whole numbers: the error is as large as the other
operand's, or the result is small."""

ROWS = {
    aten.linear.default: (0, 1), aten.matmul.default: (0, 1), aten.mm.default: (0, 1), aten.addmm.default: (1, 2),
}  # fmt: skip
"""Products of rows and a stored weight: the places of both among the arguments."""


@dataclass(frozen=True)
class AssignComputeDtype(Pass):
    """Multiply-accumulates and what hangs on them in ``dtype``; statistics, sums and unknown operations in float32

    A quantized operation computes in float32 and hands ``dtype`` on to the float operations behind it. What is written
    in place stays as it is: a cast is a copy, and the write would miss it. float32 stays, too, where a rounding in the
    8 bits of bfloat16 is no small change: in products and sums of whole numbers (positions, times), where a large
    number is added, and before a sine, a ``floor`` or a variance. With ``expand_attention``, attention is marked to run
    as two matrix products.
    """

    dtype: torch.dtype
    expand_attention: bool = False

    def run(self, gm: fx.GraphModule) -> PassResult:
        constants = Constants(gm)
        changing = written_nodes(gm.graph)
        exact = changing | read_exactly(gm.graph, FOLLOWS, MULTIPLIES)
        whole = whole_numbers(gm, self.dtype, MULTIPLIES)
        low: set[fx.Node] = set()
        before = {node: node.meta.get(COMPUTE_DTYPE) for node in gm.graph.nodes}
        for node in gm.graph.nodes:
            if node.op != "call_function" or node in constants or not _is_float32(node):
                may_round = node.op == "call_function" and node not in exact
                if may_round and _is_list(node) and self._wants(node, low, whole):
                    low.add(node)
                    node.meta[COMPUTE_DTYPE] = self.dtype
                elif node.op == "call_function" and any(n in low for n in node.all_input_nodes):
                    node.meta[COMPUTE_DTYPE] = torch.float32
                continue
            if ISLAND in node.meta:
                rows = _rows_of_weight_alone(gm, node) if self.dtype == torch.bfloat16 else None
                if rows is not None and node not in exact and rows not in whole and rows not in changing:
                    node.meta[ROUNDED_ROWS] = self.dtype
                if node not in changing:
                    low.add(node)
                node.meta[COMPUTE_DTYPE] = torch.float32
                continue
            wants = node not in exact and self._wants(node, low, whole)
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
        products = {node for node in gm.graph.nodes if node.target in MULTIPLIES - {aten.embedding.default}}
        rounded = {node for node in low if ISLAND not in node.meta and node.meta[COMPUTE_DTYPE] == self.dtype}
        for node in beyond(gm, self.dtype, rounded, products):
            node.meta[BEYOND] = True
        return PassResult(sum(node.meta.get(COMPUTE_DTYPE) != dtype for node, dtype in before.items()))

    def _wants(self, node: fx.Node, low: set[fx.Node], whole: Set[fx.Node]) -> bool:
        if node.target not in RELATIVE and not whole.isdisjoint(node.all_input_nodes):
            return False
        if node.target in MULTIPLIES:
            return True
        follows = node.target in FOLLOWS or bool(carried(node)) or getattr(node.target, "__name__", "") == "getitem"
        loses = exceeds(node, self.dtype) or shifts(node, self.dtype)
        return follows and any(source in low for source in node.all_input_nodes) and not loses


def _rows_of_weight_alone(gm: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The float input of a product whose weight alone is rounded, per output channel; None for any other operation."""
    if node.target not in ROWS:
        return None
    x, w = (node.args[place] for place in ROWS[node.target])
    assert isinstance(x, fx.Node)
    assert isinstance(w, fx.Node)
    sources = [x]
    while sources:  # an observer may stand in front of what moves values
        source = sources.pop()
        if is_observer(source):
            return None
        sources += carried(source)
    if not is_observer(w):
        return None
    observer: Any = gm.get_submodule(str(w.target))
    return x if isinstance(observer.spec.granularity, PerChannel) else None


def _is_float32(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and val.dtype == torch.float32


def _is_list(node: fx.Node) -> bool:
    val = node.meta.get("val")
    return isinstance(val, (list, tuple)) and any(isinstance(v, torch.Tensor) and v.dtype == torch.float32 for v in val)
