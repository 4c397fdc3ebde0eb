"""A sum of which every rank keeps a part: payloads are exchanged and each rank sums its own."""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.comm.graph.coded import reduced
from qpass.comm.graph.collective import SUMS, c10d
from qpass.comm.graph.transfer import exchange, issued_by, payload_of, result_shape, wait_for, world_of
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr
from qpass.ir.match import Match
from qpass.ir.rule import Rule, require


class ReduceScatterPayloads(Rule):
    """wait(reduce_scatter(decode(p)))  ->  decode_reduce(wait(all_to_all(p)))

    Exact but for the order of summation, which here is that of the ranks, and for its dtype, which here is float32.
    """

    def pattern(self, x: Any, op: Any, world: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, op, world, group))

    def check(self, m: Match, constants: Constants) -> None:
        require(m.op in SUMS, f"a {m.op} cannot be taken over payloads")
        payload_of(issued_by(m.root), m.world)

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        world, place = world_of(collective), {"like": m.root, "before": m.root}
        coded = payload_of(collective, world)
        issue = exchange(edit, collective, coded.payload, f"all_to_all of {coded.form}, summed", world)
        payloads = wait_for(edit, issue, **place)
        shape, dtype = result_shape(edit, collective, **place), m.root.meta["val"].dtype
        return reduced(edit, payloads, coded.wire, world, shape, dtype, m.op == "avg", **place)
