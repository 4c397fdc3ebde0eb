"""Run what stays in floating point in the compute dtype that ``assign_compute_dtype`` recorded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.ir.alias import written_nodes
from qpass.ir.editor import Editor
from qpass.ir.fake import recompute_val
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.strides import stand_for
from qpass.islands.qdq import CHOOSE, as_quantize
from qpass.quantize.passes.annotate import ISLAND
from qpass.quantize.passes.assign_compute_dtype import AS_IT_COMES, BEYOND, COMPUTE_DTYPE, ROUNDED_ROWS, ROWS

aten = torch.ops.aten
Casts = dict[tuple[fx.Node, torch.dtype, fx.Node | None], fx.Node]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class CastComputeDtype(Pass):
    """``matmul(a, b)  ->  matmul(to(a, bfloat16), to(b, bfloat16))`` where the record says so

    Quantized operations compute in float32 and are cast behind; where both a float reader and a quantize node follow,
    the quantize node reads the cast value too, so that a kernel can write bfloat16 once. Outputs keep their dtype. A
    value that is written in place is cast for each reader anew. Where finite values may lie beyond the range of the
    dtype, they are clamped to it, and infinities and NaN stay: ``to(where(isinf(x), x, clamp(x)), bfloat16)``.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        casts: Casts = {}
        changed: set[fx.Node] = set()
        originals = {node: _dtype(node) for node in gm.graph.nodes}
        changing = written_nodes(gm.graph)

        def cast_for(reader: fx.Node, source: fx.Node, dtype: torch.dtype | None) -> fx.Node:
            return self._cast(source, dtype, reader, source in changing, casts, edit)

        for node in list(gm.graph.nodes):
            wanted = node.meta.pop(COMPUTE_DTYPE, None)
            if node.op == "output":
                for source in node.all_input_nodes:
                    node.replace_input_with(source, cast_for(node, source, originals[source]))
            if node.op != "call_function" or wanted is None:
                continue
            rounded = node.meta.pop(ROUNDED_ROWS, None)
            rows = node.args[ROWS[node.target][0]] if rounded is not None else None
            if isinstance(rows, fx.Node) and _dtype(rows) == torch.float32:
                node.replace_input_with(rows, cast := cast_for(node, rows, rounded))
                changed.add(cast)
            for source in node.all_input_nodes if wanted is not AS_IT_COMES else ():
                if _dtype(source) in FLOATS and _dtype(source) != wanted:
                    node.replace_input_with(source, cast := cast_for(node, source, wanted))
                    changed.add(cast)
            if node.target not in CHOOSE and not changed.isdisjoint(node.all_input_nodes):
                changed.add(node)
                recompute_val(node)
        self._quantize_from_casts(casts)
        return PassResult(len(casts))

    def _cast(
        self, source: fx.Node, dtype: torch.dtype | None, reader: fx.Node, changing: bool, casts: Casts, edit: Editor
    ) -> fx.Node:
        if dtype is None or _dtype(source) == dtype:
            return source
        key = (source, dtype, reader if changing else None)
        if key not in casts:
            following = reader if changing else source.next
            while following.op == "placeholder":
                following = following.next
            origin = source if source.op == "call_function" else reader  # an input has no line of its own
            place = {"like": origin, "before": following}
            value = source
            if BEYOND in source.meta and torch.finfo(dtype).max < torch.finfo(_dtype(source)).max:
                limit = torch.finfo(dtype).max
                clamped = edit.call(aten.clamp.default, source, -limit, limit, **place)
                infinite = edit.call(aten.isinf.default, source, **place)
                value = edit.call(aten.where.self, infinite, source, clamped, **place)
            casts[key] = edit.call(aten.to.dtype, value, dtype, **place)
            stand_for(casts[key], source)
        return casts[key]

    def _quantize_from_casts(self, casts: Casts) -> None:
        for (source, dtype, reader), cast in casts.items():
            if dtype != torch.bfloat16 or ISLAND not in source.meta or reader is not None:
                continue
            for user in list(source.users):
                pair = as_quantize(user)
                if pair is not None and pair.qparams.is_static:
                    user.replace_input_with(source, cast)


def _dtype(node: fx.Node) -> Any:
    val = node.meta.get("val")
    return val.dtype if isinstance(val, torch.Tensor) else None
