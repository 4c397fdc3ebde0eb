"""Multiply sibling linears on one input by one GEMM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import fx

from qpass.arithmetic import graph_ops as ops
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor, erase_dead
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import normalized
from qpass.ir.record import describe, record_of, set_record
from qpass.ir.source import module_path
from qpass.ir.strides import stand_for
from qpass.islands.island import IslandMatch
from qpass.islands.qdq import QdqNode, as_dequantize, cast_of, only_quantize
from qpass.patterns import Linear
from qpass.spec import PerChannel
from qpass.targets import Target

aten = torch.ops.aten
_LINEAR = Linear()


@dataclass(frozen=True)
class MergeSiblings(Pass):
    """``linear(x, dq(w1), b1), linear(x, dq(w2), b2)  ->  split(linear(x, dq(cat(w1, w2)), cat(b1, b2)))``; exact

    Only where ``x`` is quantized, the weights are rounded per output channel over the same range, and neither result
    feeds a fused operation or is rounded right away: those gain more from a kernel of their own.
    """

    target: Target

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit, constants = Editor(gm, self.name), Constants(gm)
        groups: dict[Any, list[IslandMatch]] = defaultdict(list)
        for node in gm.graph.nodes:
            m = next(_LINEAR.matches(node, self.target.fusions(_LINEAR)), None) if node.op == "call_function" else None
            key = _key(m, constants) if m is not None else None
            if m is not None and key is not None:
                groups[key].append(m)
        merged = [siblings for siblings in groups.values() if len(siblings) > 1]
        for siblings in merged:
            self._merge(siblings, edit)
        return PassResult(len(merged))

    def _merge(self, siblings: Sequence[IslandMatch], edit: Editor) -> None:
        first = siblings[0]
        root = first.root
        pairs = [_weight(m) for m in siblings]
        place = {"like": root, "before": root}

        def joined(parts: Sequence[fx.Node]) -> fx.Node:
            return edit.call(aten.cat.default, list(parts), **place)

        rest = list(normalized(pairs[0].node).values())
        for pair in pairs:  # constants may stand anywhere in the graph; an expression over them belongs here
            for name in ("value", "scale", "zero_point"):
                source = getattr(pair, name, None) or getattr(pair.qparams, name)
                if root < source:
                    root.prepend(source)
        arguments = [
            joined([pair.value for pair in pairs]),
            joined([pair.qparams.scale for pair in pairs]),
            joined([pair.qparams.zero_point for pair in pairs]),
        ]
        w = edit.call(ops.dequantize_per_channel.default, *arguments, *rest[3:-1], **place)
        if first.b is not None:
            for m in siblings:
                if root < m.b:
                    root.prepend(m.b)
        b = None if first.b is None else joined([m.b for m in siblings])
        result = edit.call(aten.linear.default, first.x, w, b, **place)
        record = record_of(root) or describe(root, "quantized", _LINEAR.name)
        modules = [module_path(m.root) for m in siblings]
        kept = sum(found.float_bytes for m in siblings if (found := record_of(m.root)) is not None)
        merged = record.but(module=joint_path(modules), reason="one GEMM", size=len(siblings), float_bytes=kept)
        set_record(result, merged)
        casts = [_cast(m.root) for m in siblings]
        if all(casts):
            result = edit.call(aten.to.dtype, result, torch.bfloat16, **place)
        sizes = [int(m.w.meta["val"].shape[0]) for m in siblings]
        ends = list(accumulate(sizes))
        for m, cast, size, end in zip(siblings, casts, sizes, ends, strict=True):
            part = edit.call(aten.slice.Tensor, result, -1, end - size, end, **place)
            stand_for(part, cast or m.root)
            (cast or m.root).replace_all_uses_with(part)
        dead = [node for m, cast in zip(siblings, casts, strict=True) for node in (cast, m.root, _weight(m).node)]
        erase_dead(edit.graph, [node for node in dead if node is not None])


def joint_path(paths: Sequence[str]) -> str:
    """``a.query, a.key -> a.{query,key}``; paths without a common parent are listed."""
    parents = {path.rpartition(".")[0] for path in paths}
    if len(parents) != 1:
        return ", ".join(paths)
    prefix = f"{parent}." if (parent := parents.pop()) else ""
    return f"{prefix}{{{','.join(path.rpartition('.')[2] for path in paths)}}}"


def _key(m: IslandMatch, constants: Constants) -> Any:
    """What siblings have in common, or None for a linear that keeps a kernel of its own."""
    w = as_dequantize(m.w)
    x = as_dequantize(m.x)
    if w is None or x is None or m.fused or not isinstance(w.qparams.granularity, PerChannel):
        return None
    if w.node.target is not ops.dequantize_per_channel.default or w.value.op != "get_attr":
        return None
    if m.b is not None and m.b.op != "get_attr":
        return None
    if len(m.root.users) == 1 and not _cast(m.root) and _is_rounded(m.root):
        return None
    q = w.qparams
    return (m.x, q.granularity, q.quant_min, q.quant_max, q.dtype, m.b is None, _cast(m.root) is not None)


def _weight(m: IslandMatch) -> QdqNode:
    pair = as_dequantize(m.w)
    assert pair is not None
    return pair


def _cast(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and cast_of(users[0], torch.bfloat16) is not None else None


def _is_rounded(node: fx.Node) -> bool:
    return only_quantize(node) is not None
