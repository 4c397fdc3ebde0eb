"""One rank's tensor for all: its payload instead of its values."""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.comm.graph.coded import decoded
from qpass.comm.graph.collective import c10d, ops
from qpass.comm.graph.transfer import issued_by, payload_of, result_shape, send, wait_for
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr
from qpass.ir.match import Match
from qpass.ir.rule import Rule


class BroadcastPayload(Rule):
    """wait(broadcast(decode(p)))  ->  decode(wait(broadcast(p)))

    Exact: a payload holds its own scales.
    """

    def pattern(self, x: Any, src: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.broadcast(x, src, group))

    def check(self, m: Match, constants: Constants) -> None:
        payload_of(issued_by(m.root), 1)

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        coded, place = payload_of(collective, 1), {"like": m.root, "before": m.root}
        issue = send(edit, collective, coded.payload, f"broadcast of {coded.wire}", ops.broadcast.default, m.src)
        payload = wait_for(edit, issue, **place)
        shape, dtype = result_shape(edit, collective, **place), m.root.meta["val"].dtype
        return decoded(edit, payload, coded.wire, 1, shape, dtype, **place)
