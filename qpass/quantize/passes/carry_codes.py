"""Let codes pass through operations that only move values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.record import describe, set_record
from qpass.ir.rule import apply_rules
from qpass.islands.qdq import QdqNode, as_dequantize
from qpass.islands.views import JOINS, MONOTONE, carried
from qpass.patterns.cancel import Requantize
from qpass.spec import PerTensor

aten = torch.ops.aten
BYTES = (torch.uint8, torch.int8)


@dataclass(frozen=True)
class CarryCodes(Pass):
    """``view(dequantize(codes))  ->  dequantize(view(codes))``, and the same for all that moves values; exact

    A concatenation follows when all its inputs share their qparams; max pooling when codes are bytes. Quantize nodes
    that meet a dequantize node with the same qparams then cancel.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        count = 0
        for node in list(gm.graph.nodes):
            inputs = carried(node)
            pairs = [as_dequantize(source) for source in inputs]
            if not inputs or not _may_carry(node, pairs):
                continue
            first = pairs[0]
            assert first is not None
            codes = {pair.node: pair.value for pair in pairs if pair is not None}
            moved = self._moved(node, codes, first.qparams.dtype, edit)
            result = _again(first.node, {first.value: moved}, edit, node)
            set_record(moved, describe(node, "exact", reason="moves codes"))
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)
            for pair in dict.fromkeys(pair.node for pair in pairs if pair is not None):
                if not pair.users:
                    gm.graph.erase_node(pair)
            count += 1
        return PassResult(count + apply_rules(gm, (Requantize(),), self.name).count)

    def _moved(self, node: fx.Node, codes: Mapping[fx.Node, fx.Node], dtype: torch.dtype, edit: Editor) -> fx.Node:
        if node.target not in MONOTONE:
            return _again(node, codes, edit, node)
        # ATen's max pooling of bytes refuses images of more than 127 pixels; float32 holds every code exactly
        place = {"like": node, "before": node}
        wide = {source: edit.call(aten.to.dtype, value, torch.float32, **place) for source, value in codes.items()}
        pooled = _again(node, wide, edit, node)
        return edit.call(aten.to.dtype, pooled, dtype, **place)


def _may_carry(node: fx.Node, pairs: Sequence[QdqNode | None]) -> bool:
    if any(pair is None or not isinstance(pair.qparams.granularity, PerTensor) for pair in pairs):
        return False
    if not all(pair.qparams.is_static for pair in pairs if pair):
        return False
    qparams = {pair.qparams for pair in pairs if pair}
    if len(qparams) != 1 or not node.users:
        return False
    one = next(iter(qparams))
    if node.target in MONOTONE or node.target in JOINS:
        return one.dtype in BYTES
    return True


def _again(node: fx.Node, replaced: Mapping[fx.Node, fx.Node], edit: Editor, place: fx.Node) -> fx.Node:
    """The operation of ``node`` once more in front of ``place``, with some inputs replaced."""
    arguments: Any = fx.node.map_arg((node.args, node.kwargs), lambda n: replaced.get(n, n))
    args, kwargs = arguments
    assert callable(node.target)
    return edit.call(node.target, *args, like=place, before=place, **kwargs)
