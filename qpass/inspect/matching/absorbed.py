"""Operations that were folded into another one, as a batch norm into a convolution."""

from __future__ import annotations

from collections.abc import Mapping

from qpass.inspect.matching.pairs import readers
from qpass.inspect.values.nodes import NodeView, Snapshot


def absorbed(before: Snapshot, after: Snapshot, pairs: Mapping[int, int], gone: NodeView) -> int | None:
    """The node of ``after`` that now computes the value of a removed operation and is another one's pair: what every
    reader of the removed one reads instead, through observers and q/dq. A batch norm folded into a convolution is
    absorbed by it."""
    found = set()
    if gone.op == "get_attr" or gone.is_transparent:
        return None
    for user, position in readers(before, gone.index):
        reader = after.nodes[pairs[user]] if user in pairs else None
        if reader is None or reader.operator != before.nodes[user].operator or position >= len(reader.inputs):
            return None
        found.add(after.sources[reader.inputs[position]])
    if len(found) != 1:
        return None
    heir = found.pop()
    reads = {pairs.get(before.sources[source]) for source in gone.inputs}
    return heir if heir in reads else None
