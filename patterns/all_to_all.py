"""A part for every rank: payloads instead of values."""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.graph.constants import Constants
from qpass.graph.edit import Editor
from qpass.rewrite.coded import decoded
from qpass.rewrite.collective import EVEN_KEY, c10d
from qpass.rewrite.expression import Expr
from qpass.rewrite.match import Match
from qpass.rewrite.rule import Rule, require
from qpass.rewrite.transfer import exchange, issued_by, payload_of, wait_for, world_of


class ExchangePayloads(Rule):
    """wait(all_to_all(decode(p)))  ->  decode(wait(all_to_all(p)))

    Exact where the parts are equal and each has rows of the payload to itself: so cutting the bytes cuts the values.
    """

    def pattern(self, x: Any, outputs: Any, inputs: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.all_to_all_single(x, outputs, inputs, group))

    def check(self, m: Match, constants: Constants) -> None:
        collective = issued_by(m.root)
        require(collective.is_even, "its parts are not equal")
        require(collective.node.meta.get(EVEN_KEY), "nothing promises that its parts are equal on every rank")
        payload_of(collective, world_of(collective))

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        world, val, place = world_of(collective), m.root.meta["val"], {"like": m.root, "before": m.root}
        coded = payload_of(collective, world)
        issue = exchange(edit, collective, coded.payload, f"all_to_all of {coded.wire}", world)
        payloads = wait_for(edit, issue, **place)
        return decoded(edit, payloads, coded.wire, world, val.shape, val.dtype, **place)
