"""Run attention as two matrix products and a softmax where that is faster than the fused kernel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import normalized
from qpass.ir.record import record_of, set_record
from qpass.ir.strides import stand_for

aten = torch.ops.aten
EXPAND = "qpass_expand_attention"
"""``meta`` key on an attention that ``assign_compute_dtype`` decided to expand."""
LONGEST = 1024
"""Keys beyond which the matrix of scores costs more memory traffic than the fused kernel saves."""


@dataclass(frozen=True)
class ExpandAttention(Pass):
    """``attention(q, k, v)  ->  matmul(to(softmax(to(matmul(q * scale, k^T), float32)), dtype), v)``

    Scores are rounded to the dtype of ``q`` and probabilities to that of ``v``; the softmax between is in float32. The
    scale is one of ``q``, which is smaller than the scores: a power of two, as it is for heads of 16, 64 or 256, is
    exact there, any other is one more rounding. The decision was taken in ``prepare``. A causal mask is computed, not
    stored.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        found = [node for node in gm.graph.nodes if node.meta.pop(EXPAND, False)]
        for node in found:
            self._expand(node, edit)
        return PassResult(len(found))

    def _expand(self, node: fx.Node, edit: Editor) -> None:
        given = normalized(node)
        q, k, v = given["query"], given["key"], given["value"]
        place: dict[str, Any] = {"like": node, "before": node}
        size = q.meta["val"].shape[-1]
        scale = 1 / math.sqrt(size) if given["scale"] is None else given["scale"]
        keys = edit.call(aten.transpose.int, k, -2, -1, **place)
        scaled = edit.call(aten.mul.Tensor, q, scale, **place)
        scores = edit.call(aten.matmul.default, scaled, keys, **place)
        scores = edit.call(aten.to.dtype, scores, torch.float32, **place)
        if given["is_causal"]:
            shape = [int(q.meta["val"].shape[-2]), int(k.meta["val"].shape[-2])]
            ones = edit.call(aten.new_ones.default, q, shape, dtype=torch.bool, **place)
            future = edit.call(aten.triu.default, ones, 1, **place)
            scores = edit.call(aten.masked_fill.Scalar, scores, future, -math.inf, **place)
        weights = edit.call(aten.softmax.int, scores, -1, **place)
        weights = edit.call(aten.to.dtype, weights, v.meta["val"].dtype, **place)
        result = edit.call(aten.matmul.default, weights, v, **place)
        record = record_of(node)
        if record is not None:
            set_record(result, record)
        stand_for(result, node)
        node.replace_all_uses_with(result)
        edit.graph.erase_node(node)


def may_expand(node: fx.Node) -> bool:
    """Whether the two forms mean the same: no mask given, no dropout, as many heads everywhere, sizes known."""
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    given = normalized(node)
    lengths = [given[name].meta["val"].shape[-2] for name in ("query", "key")]
    if given["attn_mask"] is not None or given["dropout_p"] != 0 or given["enable_gqa"]:
        return False
    return all(isinstance(length, int) and length <= LONGEST for length in lengths)
