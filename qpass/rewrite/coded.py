"""Payloads in graphs: values that were encoded for the wire and decoded again, how to write them and to read them back.

    x                          [.., ..]
    encode(x)                  its payload, uint8
    decode(payload)            the values that a receiver will see
    view                       in the shape of x

Where every rank gets a part of its own, parts start on rows of the payload: each is padded with zeros to whole rows, as
`encode` pads the end of a tensor. So a payload of W parts is W payloads, one behind the other, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import qpass.ops.comm  # noqa: F401  (registers the operators)
from qpass.graph.edit import Editor
from qpass.ops.wire_format import WireFormat, parse
from qpass.rewrite.match import normalized

aten, wire_ops = torch.ops.aten, torch.ops.qpass

ENCODE = wire_ops.encode.default
DECODE = wire_ops.decode.default
DECODE_REDUCE = wire_ops.decode_reduce.default

_MOVES = (aten.view.default, aten.reshape.default, aten.clone.default)


@dataclass(frozen=True)
class Coded:
    """A value read back: the payload it was decoded from, its format, its elements, and those of each of its parts."""

    payload: fx.Node
    wire: WireFormat
    numel: int
    part: int

    def holds(self, parts: int) -> bool:
        """Whether the payload is that many payloads of equal length, one behind the other."""
        if self.numel % parts:
            return False
        each = self.numel // parts
        return self.part == each or (self.part == self.numel and each % self.wire.row == 0)


def as_coded(node: Any) -> Coded | None:
    """The reading of a decoded value of a known size, or None for any other node."""
    value = _unmoved(node)
    cut = value if isinstance(value, fx.Node) and value.target is aten.slice.Tensor else None
    if cut is not None:
        value = _unmoved(cut.args[0])
    if not isinstance(value, fx.Node) or value.target is not DECODE or not isinstance(value.args[1], int):
        return None
    payload, _, _, form = value.args
    wire, numel = parse(str(form)), math.prod(node.meta["val"].shape)
    part = numel if cut is None else _kept(cut, wire)
    return None if part is None else Coded(payload, wire, numel, part)  # type: ignore[arg-type]


def encoded(edit: Editor, x: fx.Node, wire: WireFormat, parts: int, *, like: fx.Node, before: fx.Node) -> fx.Node:
    """The payload of ``x``, or of its ``parts`` equal parts."""
    each = math.prod(x.meta["val"].shape) // parts
    padding = wire.rows(each) * wire.row - each
    if parts > 1 and padding:
        x = _shaped(edit, x, (parts, each), like, before)
        x = edit.call(aten.constant_pad_nd.default, x, [0, padding], like=like, before=before)
    return edit.call(ENCODE, x, str(wire), like=like, before=before)


def decoded(
    edit: Editor, payload: fx.Node, wire: WireFormat, parts: int, shape: Sequence[int], dtype: torch.dtype,
    *, like: fx.Node, before: fx.Node,
) -> fx.Node:  # fmt: skip
    """What `encoded` made a payload of, as values of that shape."""
    each = math.prod(shape) // parts
    padded = wire.rows(each) * wire.row if parts > 1 else each
    values = edit.call(DECODE, payload, parts * padded, dtype, str(wire), like=like, before=before)
    if padded != each:
        values = _shaped(edit, values, (parts, padded), like, before)
        values = edit.call(aten.slice.Tensor, values, 1, 0, each, like=like, before=before)
    return _shaped(edit, values, tuple(shape), like, before)


def reduced(
    edit: Editor, payloads: fx.Node, wire: WireFormat, parts: int, shape: Sequence[int], dtype: torch.dtype,
    average: bool, *, like: fx.Node, before: fx.Node,
) -> fx.Node:  # fmt: skip
    """The sum or average of ``parts`` payloads of one shape: in the order of their ranks, in float32."""
    rows = _shaped(edit, payloads, (parts, payloads.meta["val"].numel() // parts), like, before)
    numel, divisor = math.prod(shape), parts if average else 1
    total = edit.call(DECODE_REDUCE, rows, numel, dtype, str(wire), divisor, like=like, before=before)
    return _shaped(edit, total, tuple(shape), like, before)


def _unmoved(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _MOVES:
        node = node.args[0]
    return node


def _kept(cut: fx.Node, wire: WireFormat) -> int | None:
    """The elements of each part where a slice takes the padding off whole rows, as `decoded` does; else None."""
    given = normalized(cut)
    whole, part = given["self"].meta["val"].shape, given["end"]
    is_padding_off = (given["dim"], given["start"], given["step"]) == (1, 0, 1) and len(whole) == 2
    return part if is_padding_off and isinstance(part, int) and whole[1] == wire.rows(part) * wire.row else None


def _shaped(edit: Editor, x: fx.Node, shape: tuple[int, ...], like: fx.Node, before: fx.Node) -> fx.Node:
    val = x.meta["val"]
    if tuple(val.shape) == shape:
        return x
    if not val.is_contiguous():
        x = edit.call(aten.clone.default, x, memory_format=torch.contiguous_format, like=like, before=before)
    return edit.call(aten.view.default, x, list(shape), like=like, before=before)
