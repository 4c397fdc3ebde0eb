"""SplitTransfers sends large payloads in pieces, so that coding and sending overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.comm.graph.coded import DECODE, DECODE_REDUCE, ENCODE_FED, ENCODERS
from qpass.comm.graph.collective import Collective, as_collective
from qpass.comm.graph.pieces import RECEIVE, SEND
from qpass.comm.wire.format import WireFormat, parse
from qpass.comm.wire.partition import pieces_of
from qpass.ir.editor import Editor, erase_dead
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import normalized
from qpass.ir.record import record_of, set_record
from qpass.ir.sizes import holds, is_data_dependent

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitTransfers(Pass):
    """``decode(wait(all_gather(encode(x))))  ->  receive_pieces(send_pieces(x))``, and so for sums; exact.

    Each piece is sent while the next is coded, and decoded while the next arrives. A transfer starts where it started.
    One that is read by anything but one decoder is left whole, and so is one of less than two pieces, or whose parts do
    not start on rows. A symbolic size is asked what a number would be and so guards the graph; `ResolveSizes` runs
    first.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        nodes = list(gm.graph.nodes)
        return PassResult(sum(_split(found, edit) for node in nodes if (found := as_collective(node))))


def _split(collective: Collective, edit: Editor) -> int:
    node, world, group = collective.node, collective.world, collective.group
    encode, decode = _encoder(collective), _decoder(collective)
    if encode is None or decode is None or world is None or not isinstance(group, str):
        return 0
    given, wire = normalized(decode), parse(str(encode.args[1]))
    x: Any = encode.args[0]
    parts = {"all_gather": 1, "all_to_all": world}.get(collective.kind, 0)
    divisor = given["divisor"] if decode.target is DECODE_REDUCE else 0
    numel, decoded = x.meta["val"].numel(), decode.meta["val"].numel()
    if not parts or (parts > 1 and not divisor) or wire.stochastic or any(map(is_data_dependent, (numel, decoded))):
        return 0
    pieces = pieces_of(numel // parts, wire)
    if pieces == 1:
        return 0
    # More is asked only of what is large, so that few graphs are guarded by it.
    ranks, sent, read = 1 if divisor else world, collective.numel, decode.all_input_nodes[0].meta["val"].numel()
    if not (_starts_rows(numel, parts, wire) and _starts_rows(decoded, ranks, wire)):
        return 0
    if wire.rows(numel // parts) != wire.rows(decoded // ranks) or sent != wire.payload_bytes(numel):
        return 0
    if read != world * sent // parts:
        return 0
    state = encode.args[2:] if encode.target is ENCODE_FED else ()
    issue = edit.call(SEND, x, str(wire), parts, pieces, world, group, *state, like=node, before=node)
    arguments = (given["numel"], given["dtype"], str(wire), world, divisor)
    value = edit.call(RECEIVE, issue, *arguments, like=decode, before=decode)
    record = record_of(node)
    if record is not None:
        set_record(issue, record.but(kernel=f"{record.kernel}, in {pieces} pieces"))
    decode.replace_all_uses_with(value)
    dead: Any = decode
    while dead is not encode:
        source = dead.args[0]
        erase_dead(edit.graph, [dead])
        dead = source
    erase_dead(edit.graph, [encode])
    return 1


def _starts_rows(numel: int | torch.SymInt, parts: int, wire: WireFormat) -> bool:
    """Whether each of equal parts of a tensor starts on a row of its payload. Guards a symbolic size."""
    return parts == 1 or holds(numel % (parts * wire.row) == 0)


def _encoder(collective: Collective) -> fx.Node | None:
    """What makes the payload that is sent, if nothing else reads it; with symbolic sizes padding stands behind it."""
    node = collective.x
    if node.target is aten.constant_pad_nd.default and len(node.users) == 1:
        given = normalized(node)
        node = given["self"] if given["pad"][0] == 0 else node
    return node if node.target in ENCODERS and len(node.users) == 1 else None


def _decoder(collective: Collective) -> fx.Node | None:
    """The only reader of what is received, if it decodes all of it; with symbolic sizes padding is cut off first."""
    reader = collective.wait
    while reader is not None and len(reader.users) == 1:
        (reader,) = reader.users
        if reader.target in (DECODE, DECODE_REDUCE):
            return reader
        if reader.target is aten.slice.Tensor and (normalized(reader)["dim"], normalized(reader)["start"]) == (0, 0):
            continue
        if reader.target not in (aten.view.default, aten.reshape.default):
            return None
    return None
