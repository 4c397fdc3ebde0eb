"""Payloads in graphs: values that were encoded for the wire and decoded again, how to write them and to read them back.

    x                          [.., ..]
    encode(x)                  its payload, uint8
    decode(payload)            the values that a receiver will see
    view                       in the shape of x

Where every rank gets a part of its own, parts start on rows of the payload: each is padded with zeros to whole rows, as
`encode` pads the end of a tensor. So a payload of W parts is W payloads, one behind the other, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import qpass.comm.wire.fed_rounding  # noqa: F401  (registers the operators)
from qpass.comm.wire.format import WireFormat, parse
from qpass.ir.editor import Editor
from qpass.ir.match import normalized
from qpass.ir.sizes import Size, argument, arguments, is_known, is_symbolic, product, sizes, value_of
from qpass.torch_private import is_contiguous_or_false

aten, wire_ops = torch.ops.aten, torch.ops.qpass

ENCODE = wire_ops.encode.default
ENCODE_FED, CAST_FED = wire_ops.encode_fed.default, wire_ops.cast_fed.default
ENCODERS = (ENCODE, ENCODE_FED)
DECODE = wire_ops.decode.default
DECODE_REDUCE = wire_ops.decode_reduce.default

_MOVES = (aten.view.default, aten.reshape.default, aten.clone.default)

Shape = Sequence[int | Size]


@dataclass(frozen=True)
class Coded:
    """A value read back: the payload it was decoded from, its format, its elements, and the parts that start rows."""

    payload: fx.Node
    wire: WireFormat
    numel: int | torch.SymInt
    parts: int

    @property
    def form(self) -> str:
        """The format in words, with whether what rounding takes is fed back."""
        return f"{self.wire} with error feedback" if self.payload.target is ENCODE_FED else str(self.wire)

    def holds(self, parts: int) -> bool:
        """Whether the payload is that many payloads of equal length, one behind the other."""
        return self.parts == parts or (self.parts == 1 and _starts_rows(self.numel, parts, self.wire))


def as_coded(node: Any) -> Coded | None:
    """The reading of a decoded value, or None for any other node."""
    value = _unmoved(node)
    cut = value if isinstance(value, fx.Node) and value.target is aten.slice.Tensor else None
    if cut is not None:
        value = _unmoved(cut.args[0])
    if not isinstance(value, fx.Node) or value.target is not DECODE:
        return None
    given: Any = value.args
    payload, _, _, form = given
    wire = parse(str(form))
    parts = 1 if cut is None else _kept(cut, wire)
    return None if parts is None else Coded(payload, wire, node.meta["val"].numel(), parts)


def encoded(
    edit: Editor, x: fx.Node, wire: WireFormat, parts: int, state: str = "", *, like: fx.Node, before: fx.Node
) -> fx.Node:
    """The payload of ``x``, or of its ``parts`` equal parts; ``state`` names its residual, where it is to have one."""
    if parts > 1 and not _starts_rows(x.meta["val"].numel(), parts, wire):
        each = product(sizes(edit, x, like=like, before=before)) // parts
        padding = wire.rows(each) * wire.row - each
        x = _shaped(edit, x, (parts, each), like, before)
        x = edit.call(aten.constant_pad_nd.default, x, [0, argument(padding)], like=like, before=before)
    if state:
        return edit.call(ENCODE_FED, x, str(wire), state, like=like, before=before)
    return edit.call(ENCODE, x, str(wire), like=like, before=before)


def decoded(
    edit: Editor, payload: fx.Node, wire: WireFormat, parts: int, shape: Shape, dtype: torch.dtype,
    *, like: fx.Node, before: fx.Node,
) -> fx.Node:  # fmt: skip
    """What `encoded` made a payload of, as values of that shape."""
    numel = product(shape)
    each = numel // parts
    is_whole = parts == 1 or _starts_rows(value_of(numel), parts, wire)
    padded = each if is_whole else wire.rows(each) * wire.row
    whole = numel if is_whole else parts * padded
    values = edit.call(DECODE, payload, argument(whole), dtype, str(wire), like=like, before=before)
    if not is_whole:
        values = _shaped(edit, values, (parts, padded), like, before)
        values = edit.call(aten.slice.Tensor, values, 1, 0, argument(each), like=like, before=before)
    return _shaped(edit, values, shape, like, before)


def reduced(
    edit: Editor, payloads: fx.Node, wire: WireFormat, parts: int, shape: Shape, dtype: torch.dtype,
    average: bool, *, like: fx.Node, before: fx.Node,
) -> fx.Node:  # fmt: skip
    """The sum or average of ``parts`` payloads of one shape: in the order of their ranks, in float32."""
    (size,) = sizes(edit, payloads, like=like, before=before)
    rows = _shaped(edit, payloads, (parts, size // parts), like, before)
    numel, divisor = argument(product(shape)), parts if average else 1
    total = edit.call(DECODE_REDUCE, rows, numel, dtype, str(wire), divisor, like=like, before=before)
    return _shaped(edit, total, shape, like, before)


def shape_of(edit: Editor, x: fx.Node, *, like: fx.Node, before: fx.Node) -> list[int | Size]:
    """The shape of a decoded value, by the sizes that the graph gives it: so that it need not be kept for its shape."""
    stated: Any = ()
    if x.target is DECODE:
        stated = x.args[1:2]
    elif x.target is aten.view.default:
        stated = x.args[1]
    return sizes(edit, x, stated, like=like, before=before)


def _starts_rows(numel: int | torch.SymInt, parts: int, wire: WireFormat) -> bool:
    """Whether equal parts of so many elements start on rows of a payload by themselves."""
    if wire.row == 1 and is_symbolic(numel):  # whoever cuts it into equal parts has seen to it
        return True
    return is_known(numel % (parts * wire.row) == 0)


def _unmoved(node: Any) -> Any:
    while isinstance(node, fx.Node) and node.target in _MOVES:
        node = node.args[0]
    return node


def _kept(cut: fx.Node, wire: WireFormat) -> int | None:
    """The number of parts where a slice takes the padding off whole rows of each, as `decoded` does; else None."""
    given = normalized(cut)
    whole, end = given["self"].meta["val"].shape, given["end"]
    part = end.meta["val"] if isinstance(end, fx.Node) else end
    if (given["dim"], given["start"], given["step"]) != (1, 0, 1) or len(whole) != 2 or part is None:
        return None
    is_padding_off = not is_symbolic(whole[0]) and is_known(whole[1] == wire.rows(part) * wire.row)
    return int(whole[0]) if is_padding_off else None


def _shaped(edit: Editor, x: fx.Node, shape: Shape, like: fx.Node, before: fx.Node) -> fx.Node:
    val = x.meta["val"]
    if len(val.shape) == len(shape) and all(is_known(a == value_of(b)) for a, b in zip(val.shape, shape, strict=True)):
        return x
    if not is_contiguous_or_false(val):
        x = edit.call(aten.clone.default, x, memory_format=torch.contiguous_format, like=like, before=before)
    return edit.call(aten.view.default, x, arguments(shape), like=like, before=before)
