"""JoinTransfers sends small payloads together, so that they wait for the link once."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.comm.graph.coded import ENCODE_FED, ENCODERS
from qpass.comm.graph.collective import KINDS, WAIT, Collective, as_collective
from qpass.comm.graph.joined import CUT, JOIN
from qpass.comm.graph.pieces import SEND
from qpass.comm.graph.transfer import result_shape
from qpass.comm.wire.partition import CHUNK
from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import normalized
from qpass.ir.record import record_of, records_of, set_records
from qpass.ir.sizes import argument, arguments, is_data_dependent, product, sizes

aten = torch.ops.aten

LARGEST = CHUNK
"""Bytes that are sent together at most, to each rank: about the payload of one piece of a large tensor."""

SPLITS = ("output_split_sizes", "input_split_sizes")


@dataclass(frozen=True)
class JoinTransfers(Pass):
    """``wait(all_gather(p)), wait(all_gather(q))  ->  cuts of wait(all_gather(join([p, q])))``; exact.

    So for broadcasts of one rank, and for the equal parts that sums exchange: what goes to one rank stays together.
    Members have one operator and one group, and equally many collectives before them on their longest chain of
    dependencies: so none needs what another receives, and no two buckets need each other. The transfer starts where
    the first of them did, behind all that the others are computed from, and is waited for where the first result was.
    That result may come later than alone; it is small, and so are all it waits for. No bucket reaches over an operator
    that writes in place, draws random numbers or checks something, so that nothing moves past one. Anything
    that is not a payload, or that may have another size on another rank, is left alone. A symbolic size is compared as
    a number would be, which guards the graph; `ResolveSizes` runs first.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        buckets = [bucket for bucket in _buckets(gm.graph) if len(bucket) > 1]
        for bucket in buckets:
            _join(bucket, Editor(gm, self.name))
        return PassResult(len(buckets))


def _buckets(graph: fx.Graph) -> list[list[Collective]]:
    """The payloads that are sent together, in the order of the graph."""
    depths: dict[fx.Node, int] = {}
    current: dict[Hashable, list[Collective]] = {}
    made: list[list[Collective]] = []
    for node in graph.nodes:
        depth = max((depths[each] for each in node.all_input_nodes), default=0)
        depths[node] = depth + (node.target in KINDS or node.target is SEND)
        found = as_collective(node)
        if found is not None and _is_joinable(found):
            key = (node.target, depth, found.world, *(v for k, v in _settings(node).items() if k not in SPLITS))
            bucket = current.get(key, [])
            if not bucket or sum(map(_size, bucket)) + _size(found) > LARGEST:
                made.append(bucket := [])
                current[key] = bucket
            bucket.append(found)
        elif _has_effect(node):
            current.clear()
    return made


def _is_joinable(collective: Collective) -> bool:
    """Whether a collective sends a payload of which every rank knows that it is small."""
    x, record = collective.x, record_of(collective.node)
    is_payload = x.target in ENCODERS or (record is not None and record.outcome == "lowered")
    if not is_payload or collective.dtype is not torch.uint8 or collective.wait is None:
        return False
    if collective.kind == "all_to_all" and (record is None or record.op == "all_to_all"):
        return False  # ranks may send unequal parts where this one's are equal
    return not is_data_dependent(collective.numel) and bool(0 < _size(collective) < LARGEST)


def _size(collective: Collective) -> int | torch.SymInt:
    """Bytes for each rank."""
    return collective.numel // _parts(collective)


def _parts(collective: Collective) -> int:
    return int(collective.world or 1) if collective.kind == "all_to_all" else 1


def _settings(node: fx.Node) -> dict[str, Any]:
    """The arguments of a collective but for what it sends."""
    return {name: value for name, value in normalized(node).items() if name != "input"}


def _has_effect(node: fx.Node) -> bool:
    """Whether other nodes must stay where they are, before or behind this one."""
    if node.op in ("placeholder", "get_attr", "output") or node.target is ENCODE_FED:  # which has a residual of its own
        return False
    if node.target is WAIT:  # what reads the same without it must stay behind it
        return any(len(source.users) > 1 for source in node.all_input_nodes)
    return node.op != "call_function" or isinstance(node.target, torch_private.HigherOrderOperator) or node.is_impure()


def _join(bucket: list[Collective], edit: Editor) -> None:
    # Read again: what was received by a bucket before this one is another node now.
    members = [member for each in bucket if (member := as_collective(each.node)) is not None]
    first = members[0].node
    _move_up([member.x for member in members], first, members[-1].node)
    parts, world = _parts(members[0]), members[0].world
    here: Any = {"like": first, "before": first}
    payload = edit.call(JOIN, [member.x for member in members], parts, **here)
    lengths = [product(sizes(edit, member.x, **here)) // parts for member in members]
    ends = list(accumulate(lengths, initial=0))
    splits = [argument(ends[-1])] * parts
    settings = {name: splits if name in SPLITS else value for name, value in _settings(first).items()}
    issue = edit.call(first.target, payload, *settings.values(), **here)  # type: ignore[arg-type]  # an operator
    others = len(members) - 1
    told = f", joined with {others} other{'s' if others > 1 else ''}"
    set_records(issue, [r.but(kernel=r.kernel + told) for member in members for r in records_of(member.node)])

    waits = [wait for member in members if (wait := member.wait) is not None]
    there: Any = {"like": min(waits), "before": min(waits)}
    received, ranks = edit.call(WAIT, issue, **there), 1 if members[0].kind == "broadcast" else world
    for member, wait, (start, stop) in zip(members, waits, pairwise(ends), strict=True):
        place: Any = {"like": wait, "before": wait}
        part = edit.call(CUT, received, ranks, argument(start), argument(stop), **place)
        if wait.meta["val"].dim() != 1:
            shape = arguments(result_shape(edit, member, **place))
            part = edit.call(aten.view.default, part, shape, **place)
        wait.replace_all_uses_with(part)
        edit.graph.erase_node(wait)
        edit.graph.erase_node(member.node)


def _move_up(wanted: list[fx.Node], first: fx.Node, last: fx.Node) -> None:
    """Move what ``wanted`` is computed from, as far as it stands between two nodes, in front of the first of them."""
    needed, moved = set(wanted), []
    node = last.prev
    while node is not first:
        if node in needed:
            needed.update(node.all_input_nodes)
            moved.append(node)
        node = node.prev
    for node in reversed(moved):
        first.prepend(node)
