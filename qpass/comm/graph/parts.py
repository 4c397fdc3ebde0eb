"""The parts of an all_to_all, cut along the first dimension by the sizes that the graph says.

Every part is a payload of its own, on every rank. Where what stands behind the first dimension fills whole rows of a
payload, that holds for any cut of one payload; else each part is coded by itself::

    part_0, part_1 = split_with_sizes(x, [s0, s1])      x: [s0 + s1, 100]
    cat([decode(encode(part_0)), decode(encode(part_1))])
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from qpass.comm.graph.coded import Coded, Shape, as_coded, decoded, encoded
from qpass.comm.wire.format import WireFormat
from qpass.ir.editor import Editor
from qpass.ir.sizes import arguments, is_known, size, sizes

aten = torch.ops.aten


def fills_rows(x: fx.Node, wire: WireFormat) -> bool:
    """Whether each index of the first dimension of ``x`` is whole rows of a payload. Equal on all ranks."""
    shape = x.meta["val"].shape
    return len(shape) > 0 and is_known(math.prod(shape[1:]) % wire.row == 0)


def coded_parts(
    edit: Editor, x: fx.Node, splits: Sequence[int | fx.Node], wire: WireFormat, *, like: fx.Node, before: fx.Node
) -> fx.Node:
    """``x`` with each part rounded by itself."""
    place: Any = {"like": like, "before": before}
    rest, dtype, parts = sizes(edit, x, **place)[1:], x.meta["val"].dtype, []
    for part, split in zip(_cut(edit, x, splits, **place), splits, strict=True):
        payload = encoded(edit, part, wire, 1, **place)
        parts.append(decoded(edit, payload, wire, 1, (size(edit, split, **place), *rest), dtype, **place))
    return edit.call(aten.cat.default, parts, **place)


def as_coded_parts(parts: Sequence[fx.Node]) -> list[Coded] | None:
    """The readings of decoded values, all of one format; None if they are not that."""
    found = [coded for part in parts if (coded := as_coded(part)) is not None and coded.parts == 1]
    return found if len(found) == len(parts) and len({coded.wire for coded in found}) == 1 else None


def joined(
    edit: Editor, payloads: Sequence[fx.Node], *, like: fx.Node, before: fx.Node
) -> tuple[fx.Node, list[int | fx.Node]]:  # fmt: skip
    """Payloads one behind the other, and the bytes of each."""
    place: Any = {"like": like, "before": before}
    lengths = arguments(length for payload in payloads for length in sizes(edit, payload, **place))
    return edit.call(aten.cat.default, list(payloads), **place), lengths


def decoded_parts(
    edit: Editor, payloads: fx.Node, lengths: Sequence[int | fx.Node], splits: Shape, rest: Shape, wire: WireFormat,
    dtype: torch.dtype, *, like: fx.Node, before: fx.Node,
) -> fx.Node:  # fmt: skip
    """The values of payloads of those lengths, each of ``[split, *rest]``, as one tensor."""
    place: Any = {"like": like, "before": before}
    pieces = zip(_cut(edit, payloads, lengths, **place), splits, strict=True)
    parts = [decoded(edit, piece, wire, 1, (split, *rest), dtype, **place) for piece, split in pieces]
    return edit.call(aten.cat.default, parts, **place)


def _cut(
    edit: Editor, x: fx.Node, splits: Sequence[int | fx.Node], *, like: fx.Node, before: fx.Node
) -> list[fx.Node]:  # fmt: skip
    pieces = edit.call(aten.split_with_sizes.default, x, list(splits), like=like, before=before)
    return [edit.call(operator.getitem, pieces, i, like=like, before=before) for i in range(len(splits))]
