"""Send large payloads in pieces, so that coding and sending overlap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.comm.pieces import RECEIVE, SEND, pieces_of
from qpass.graph.edit import Editor, erase_dead
from qpass.graph.record import record_of, set_record
from qpass.ops.wire_format import parse
from qpass.passes.frame import Pass
from qpass.rewrite.coded import DECODE, DECODE_REDUCE, ENCODE_FED, ENCODERS
from qpass.rewrite.collective import Collective, as_collective
from qpass.rewrite.match import normalized

aten = torch.ops.aten


@dataclass(frozen=True)
class SplitTransfers(Pass):
    """``decode(wait(all_gather(encode(x))))  ->  receive_pieces(send_pieces(x))``, and so for sums; exact.

    Each piece is sent while the next is coded, and decoded while the next arrives. A transfer starts where it started.
    One that is read by anything but one decoder is left whole, and so is one of less than two pieces.
    """

    def run(self, gm: fx.GraphModule) -> int:
        edit = Editor(gm, self.name)
        return sum(_split(collective, edit) for node in list(gm.graph.nodes) if (collective := as_collective(node)))


def _split(collective: Collective, edit: Editor) -> int:
    node, encode, world, group = collective.node, collective.x, collective.world, collective.group
    decode = _decoder(collective)
    is_payload = encode.target in ENCODERS and len(encode.users) == 1
    if not is_payload or decode is None or world is None or not isinstance(group, str):
        return 0
    given, wire = normalized(decode), parse(str(encode.args[1]))
    x: Any = encode.args[0]
    parts = {"all_gather": 1, "all_to_all": world}.get(collective.kind, 0)
    divisor = given["divisor"] if decode.target is DECODE_REDUCE else 0
    numel = x.meta["val"].numel()
    if not parts or (parts > 1 and not divisor) or wire.stochastic or not isinstance(numel, int) or numel % parts:
        return 0
    each, decoded = numel // parts, given["numel"] if divisor else given["numel"] // world
    pieces = pieces_of(each, wire)
    if pieces == 1 or wire.rows(each) != wire.rows(decoded):
        return 0
    state = encode.args[2:] if encode.target is ENCODE_FED else ()
    sent = edit.call(SEND, x, str(wire), parts, pieces, world, group, *state, like=node, before=node)
    arguments = (given["numel"], given["dtype"], str(wire), world, divisor)
    value = edit.call(RECEIVE, sent, *arguments, like=decode, before=decode)
    record = record_of(node)
    if record is not None:
        set_record(sent, record.but(kernel=f"{record.kernel}, in {pieces} pieces"))
    decode.replace_all_uses_with(value)
    dead: Any = decode
    while dead is not encode:
        source = dead.args[0]
        erase_dead(edit.graph, [dead])
        dead = source
    erase_dead(edit.graph, [encode])
    return 1


def _decoder(collective: Collective) -> fx.Node | None:
    """The only reader of what is received, if it decodes all of it."""
    reader = collective.wait
    while reader is not None and len(reader.users) == 1:
        (reader,) = reader.users
        if reader.target in (DECODE, DECODE_REDUCE):
            return reader
        if reader.target not in (aten.view.default, aten.reshape.default):
            return None
    return None
