"""Collectives that only move values: the codes they were dequantized from instead, and their scales where needed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import fx

from qpass.arithmetic import graph_ops
from qpass.arithmetic.numerics import dtype_name
from qpass.comm.graph.collective import Collective, c10d, ops
from qpass.comm.graph.shared import are_shared
from qpass.comm.graph.transfer import issued_by, result_shape, send, wait_for, world_of
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr
from qpass.ir.match import Match, set_arguments
from qpass.ir.rule import Rule, require
from qpass.ir.sizes import arguments, is_data_dependent
from qpass.islands.qdq import DEQUANTIZE, QUANTIZE, QdqNode, as_dequantize, as_quantize
from qpass.spec import PerChannel, PerTensor

aten = torch.ops.aten

SENT_CODES = (torch.int8, torch.uint8)
QPARAMS = 12
"""Bytes of a scale and a zero point on the wire: float32 and int64."""

UNPROVED = "nothing proves that its scale and zero point are equal on all ranks"


class MoveCodes(Rule):
    """wait(move(dequantize(codes)))  ->  dequantize(wait(move(codes))), move being all_gather, all_to_all or broadcast

    Exact where all ranks have the same scales, and none of them belongs to a part of the dimension that is moved along.
    """

    def pattern(self, codes: Any) -> Iterable[Expr]:
        for dequantize in DEQUANTIZE:
            for move in (c10d.all_gather_into_tensor, c10d.all_to_all_single, c10d.broadcast):
                yield c10d.wait_tensor(move(Expr(dequantize, (codes,), {})))

    def check(self, m: Match, constants: Constants) -> None:
        collective, pair = _read(m.root)
        _check(pair, collective, moves=collective.kind != "broadcast")
        require(are_shared(pair, collective.group), UNPROVED, collective.node)

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective, pair = _read(m.root)
        place: Any = {"like": m.root, "before": m.root}
        moved = wait_for(edit, _send_codes(edit, collective, pair), **place)
        return _again(edit, pair, moved, **place)


class GatherScales(Rule):
    """wait(all_gather(dequantize(codes, scale)))  ->  dequantize(wait(all_gather(codes)), wait(all_gather(scale)))

    Exact: each rank's codes meet that rank's scales, be they one for the tensor or one for each index of dimension 0.
    """

    def pattern(self, codes: Any, world: Any, group: Any) -> Iterable[Expr]:
        for dequantize, granularity in DEQUANTIZE.items():
            if granularity in (PerTensor, PerChannel):
                value = Expr(dequantize, (codes,), {})
                yield c10d.wait_tensor(c10d.all_gather_into_tensor(value, world, group))

    def check(self, m: Match, constants: Constants) -> None:
        collective, pair = _read(m.root)
        _check(pair, collective, moves=False)
        axis = _axis(pair) or 0
        require(axis == 0, f"its scales belong to dimension {axis}, along which nothing is gathered", collective.node)
        require(not are_shared(pair, collective.group), "its scales are known everywhere", collective.node)
        plain = isinstance(pair.qparams.quant_min, int) and pair.qparams.zero_point is not None
        require(plain, "the range of its codes or its zero point is not stated", collective.node)
        rows = pair.value.meta["val"].shape[0] if isinstance(pair.qparams.granularity, PerChannel) else 1
        saved = collective.numel * (collective.dtype.itemsize - pair.qparams.dtype.itemsize)
        pays = is_data_dependent(collective.numel) or saved > QPARAMS * rows
        require(pays, "its scales take more bytes than its codes save", collective.node)

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective, pair = _read(m.root)
        here: Any = {"like": m.root, "before": collective.node}
        place: Any = {"like": m.root, "before": m.root}
        world, qparams = world_of(collective), pair.qparams
        issue = _send_codes(edit, collective, pair)
        parts = [
            edit.call(ops.all_gather_into_tensor.default, part, world, collective.group, **here)
            for part in (
                _row(edit, qparams.scale, torch.float32, **here), _row(edit, qparams.zero_point, torch.int64, **here),
            )
        ]  # fmt: skip
        codes = wait_for(edit, issue, **place)
        scales, zero_points = (wait_for(edit, part, **place) for part in parts)
        one = isinstance(qparams.granularity, PerTensor)
        if one:
            codes = edit.call(aten.reshape.default, codes, [world, -1], **place)
        given = (0, qparams.quant_min, qparams.quant_max, qparams.dtype)
        dtype = pair.node.meta["val"].dtype
        values = edit.call(
            graph_ops.dequantize_per_channel.default, codes, scales, zero_points, *given, out_dtype=dtype, **place
        )
        shape = arguments(result_shape(edit, collective, **place))
        return edit.call(aten.reshape.default, values, shape, **place) if one else values


class QuantizeBeforeGather(Rule):
    """quantize(wait(all_gather(x)))  ->  wait(all_gather(quantize(x)))

    Exact where all ranks have the same scales, and none of them belongs to a part of the dimension that is gathered.
    """

    def pattern(self, x: Any, world: Any, group: Any) -> Iterable[Expr]:
        for quantize in QUANTIZE:
            yield Expr(quantize, (c10d.wait_tensor(c10d.all_gather_into_tensor(x, world, group)),), {})

    def check(self, m: Match, constants: Constants) -> None:
        pair = as_quantize(m.root)
        assert pair is not None
        collective = issued_by(pair.value)
        _check(pair, collective, moves=True)
        require(are_shared(pair, m.group), UNPROVED, collective.node)
        early = all(node < collective.node for node in m.root.all_input_nodes if node is not pair.value)
        require(early, "its scale is computed after the transfer has started", collective.node)

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        pair = as_quantize(m.root)
        assert pair is not None
        wait = pair.value
        collective = issued_by(wait)
        codes = _again(edit, pair, m.x, like=m.root, before=collective.node)
        how = f"all_gather of {dtype_name(pair.qparams.dtype)}"
        issue = send(edit, collective, codes, how, ops.all_gather_into_tensor.default, m.world)
        return wait_for(edit, issue, like=wait, before=wait)


def _read(wait: fx.Node) -> tuple[Collective, QdqNode]:
    collective = issued_by(wait)
    pair = as_dequantize(collective.x)
    assert pair is not None
    return collective, pair


def _check(pair: QdqNode, collective: Collective, moves: bool) -> None:
    """Refuse codes that cannot be sent, and scales that lie along the dimension that ``moves``."""
    dtype, granularity = pair.qparams.dtype, pair.qparams.granularity
    require(dtype in SENT_CODES, f"codes of {dtype_name(dtype)} do not travel", collective.node)
    known = isinstance(granularity, (PerTensor, PerChannel))
    require(known, f"scales of {type(granularity).__name__} are left where they are", collective.node)
    require(not moves or _axis(pair) != 0, "its scales belong to the dimension that is moved along", collective.node)


def _axis(pair: QdqNode) -> int | None:
    """The dimension that has a scale for each index, counted from the front; None where one scale is for all."""
    granularity = pair.qparams.granularity
    return granularity.axis % pair.value.meta["val"].dim() if isinstance(granularity, PerChannel) else None


def _send_codes(edit: Editor, collective: Collective, pair: QdqNode) -> fx.Node:
    target: Any = collective.node.target
    how = f"{collective.kind} of {dtype_name(pair.qparams.dtype)}"
    return send(edit, collective, pair.value, how, target, *collective.node.args[1:-1])


def _again(edit: Editor, pair: QdqNode, x: fx.Node, *, like: fx.Node, before: fx.Node) -> fx.Node:
    """The quantize or dequantize node of ``pair`` over ``x``."""
    target, kwargs = cast(Any, pair.node.target), cast(Any, pair.node.kwargs)
    node = edit.call(target, *pair.node.args, like=like, before=before, **kwargs)
    set_arguments(node, input=x)
    node.meta["val"] = node.meta["val"].new_empty(x.meta["val"].shape)
    return node


def _row(edit: Editor, value: Any, dtype: torch.dtype, *, like: fx.Node, before: fx.Node) -> fx.Node:
    """A scale or zero point as a tensor of one dimension."""
    if not isinstance(value, fx.Node):
        val = like.meta["val"].new_empty(1, dtype=dtype)
        place: Any = {"like": like, "before": before, "val": val}
        return edit.call(aten.full.default, [1], value, dtype=dtype, device=val.device, **place)
    if value.meta["val"].dtype is not dtype:
        value = edit.call(aten.to.dtype, value, dtype, like=like, before=before)
    return edit.call(aten.reshape.default, value, [-1], like=like, before=before)
