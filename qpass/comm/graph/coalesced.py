"""Coalesced collectives, which send a list of tensors: as one collective of one tensor, the bucket.

    first, second = all_reduce_coalesced([x, y])          x: [4, 50], y: [300]
    wait(first), wait(second)

    bucket = cat([pad(x), pad(y)])                        [256 + 384], each padded to whole rows of a payload
    sum = wait(all_reduce(bucket))
    sum[0:200].view(4, 50), sum[256:556]

A collective moves or sums elements one by one, so where they stand changes nothing. Each tensor starts on a row, so
that it is rounded as it would be alone. What is written in place is copied there where it is waited for, as in
`qpass.comm.graph.in_place`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.arithmetic.numerics import dtype_name
from qpass.comm.graph.collective import SENT_KEY, WAIT, WORLD_KEY, group_name, ops, world_in
from qpass.comm.wire.format import WireFormat
from qpass.ir.editor import Editor
from qpass.ir.match import normalized
from qpass.ir.rule import require
from qpass.ir.sizes import Size, argument, arguments, product, sizes

aten = torch.ops.aten

COALESCED: dict[Any, tuple[str, Any]] = {
    ops.all_gather_into_tensor_coalesced.default: ("all_gather", ops.all_gather_into_tensor.default),
    ops.all_reduce_coalesced.default: ("all_reduce", ops.all_reduce.default),
    ops.all_reduce_coalesced_.default: ("all_reduce", ops.all_reduce.default),
    ops.reduce_scatter_tensor_coalesced.default: ("reduce_scatter", ops.reduce_scatter_tensor.default),
}
"""Operator -> its kind, and the operator that does the same to one tensor."""

WRITING = (ops.all_reduce_coalesced_.default,)
"""Those that write their results over what they send."""


@dataclass(frozen=True)
class Coalesced:
    """One collective that sends several tensors; ``waits`` by their place in the list, where they are read."""

    node: fx.Node
    kind: str
    xs: list[fx.Node]
    waits: dict[int, fx.Node]
    op: str
    world: int | None

    @property
    def group_name(self) -> str:
        """The name of the process group; ``""`` where the graph does not hold it."""
        return group_name(self.node)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all its tensors."""
        return self.xs[0].meta["val"].dtype

    @property
    def numel(self) -> int | torch.SymInt:
        """The elements of all its tensors."""
        return sum(x.meta["val"].numel() for x in self.xs)


def as_coalesced(node: fx.Node) -> Coalesced:
    """The reading of one of `COALESCED`.

    Raises:
        Refusal: it cannot be a collective of one tensor.
    """
    kind, _ = COALESCED[node.target]
    given = normalized(node)
    xs = given["inputs"]
    dtypes = sorted({dtype_name(x.meta["val"].dtype) for x in xs})
    require(len(dtypes) == 1, f"its tensors are of {' and '.join(dtypes)}", node)
    waits = {}
    for item in node.users:
        index: Any = item.args[1] if item.target is operator.getitem else None
        readers = [reader for reader in item.users if reader.target is not aten.sym_size.int]
        is_waited = index is not None and len(readers) == 1 and readers[0].target is WAIT
        require(is_waited and index not in waits, NOT_WAITED, node)
        waits[index] = readers[0]
    is_read = len(waits) == len(xs) if node.target in WRITING else waits
    require(is_read, NOT_WAITED, node)
    return Coalesced(node, kind, list(xs), waits, given.get("reduce_op", ""), world_in(node))


NOT_WAITED = "its result is read without being waited for, or more than once"


def as_bucket(edit: Editor, found: Coalesced, wire: WireFormat) -> fx.Node:
    """Send the bucket instead of the list, and return the node that does; results are read off it where they were."""
    node, world = found.node, found.world
    assert world is not None
    here: Any = {"like": node, "before": node}
    parts = world if found.kind == "reduce_scatter" else 1
    lengths: list[int | Size] = [product(sizes(edit, x, **here)) // parts for x in found.xs]
    rooms = [wire.rows(length) * wire.row for length in lengths]
    padded = []
    for x, length, room in zip(found.xs, lengths, rooms, strict=True):
        flat = edit.call(aten.reshape.default, x, arguments((parts, length)), **here)
        if isinstance(room, Size) or room != length:
            flat = edit.call(aten.constant_pad_nd.default, flat, [0, argument(room - length)], **here)
        padded.append(flat)
    bucket = edit.call(aten.reshape.default, edit.call(aten.cat.default, padded, 1, **here), [-1], **here)
    _, target = COALESCED[node.target]
    issue = edit.call(target, bucket, *node.args[1:], **here)
    issue.meta |= {SENT_KEY: found.numel * found.dtype.itemsize, WORLD_KEY: world}
    first = min(found.waits.values())
    result = edit.call(WAIT, issue, like=first, before=first)
    rows = world if found.kind == "all_gather" else 1
    table = edit.call(aten.reshape.default, result, [rows, -1], like=first, before=first)
    start: int | Size = 0
    for index, (length, room) in enumerate(zip(lengths, rooms, strict=True)):
        if (wait := found.waits.get(index)) is not None:
            place: Any = {"like": wait, "before": wait}
            ends = (argument(start), argument(start + length))
            values = edit.call(aten.slice.Tensor, table, 1, *ends, **place)
            shape = arguments(_shape(edit, found.xs[index], rows, parts, **place))
            result = edit.call(aten.reshape.default, values, shape, **place)
            if node.target in WRITING:
                edit.call(aten.copy_.default, found.xs[index], result, **place)
            wait.replace_all_uses_with(result)
        start = start + room
    item: Any
    reader: Any
    for item in list(node.users):
        for reader in list(item.users):
            if reader.target is aten.sym_size.int:  # asked before the transfer has ended
                shape = arguments(_shape(edit, found.xs[item.args[1]], rows, parts, like=reader, before=node))
                reader.replace_all_uses_with(shape[reader.args[1]])
            edit.graph.erase_node(reader)
        edit.graph.erase_node(item)
    edit.graph.erase_node(node)
    return issue


def _shape(
    edit: Editor, x: fx.Node, rows: int, parts: int, *, like: fx.Node, before: fx.Node
) -> list[int | Size]:  # fmt: skip
    """The shape of the result for ``x``: of ``rows`` ranks, in ``parts``."""
    found = sizes(edit, x, like=like, before=before)
    return [found[0] * rows // parts, *found[1:]] if found else []
