"""A sum for all ranks, over payloads: in one transfer, or in two that send less where there are many ranks.

A sum that is rounded again, ``encode(wait(all_reduce(decode(p))))``, is licence for the second transfer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from qpass.comm.graph.coded import ENCODERS, reduced
from qpass.comm.graph.collective import SUMS, c10d, ops
from qpass.comm.graph.transfer import exchange, issued_by, payload_of, result_shape, send, wait_for, world_of
from qpass.comm.wire.partition import Partition
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr
from qpass.ir.match import Match
from qpass.ir.rule import Rule, require
from qpass.ir.sizes import argument, holds, sizes

aten = torch.ops.aten


class AllReduceOneShot(Rule):
    """wait(all_reduce(decode(p)))  ->  decode_reduce(wait(all_gather(p)))

    Exact but for the order of summation, which here is that of the ranks, and for its dtype, which here is float32.
    """

    def pattern(self, x: Any, op: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.all_reduce(x, op, group))

    def check(self, m: Match, constants: Constants) -> None:
        require(m.op in SUMS, f"a {m.op} cannot be taken over payloads")
        payload_of(issued_by(m.root), 1)
        world_of(issued_by(m.root))

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        world, place = world_of(collective), {"like": m.root, "before": m.root}
        coded = payload_of(collective, 1)
        how = f"all_gather of {coded.form}, summed"
        issue = send(edit, collective, coded.payload, how, ops.all_gather_into_tensor.default, world)
        payloads = wait_for(edit, issue, **place)
        shape, dtype = result_shape(edit, collective, **place), m.root.meta["val"].dtype
        return reduced(edit, payloads, coded.wire, world, shape, dtype, m.op == "avg", **place)


class AllReduceTwoShot(Rule):
    """encode(wait(all_reduce(decode(p))))  ->  wait(all_gather(encode(decode_reduce(wait(all_to_all(p))))))

    Each rank sums as many rows as any other, zeros behind the last of them. Exact as the one-shot form is. Where the
    sum is fed back what rounding took from it, each rank keeps that of its rows.
    """

    def pattern(self, x: Any, op: Any, group: Any, form: Any, last: Any) -> Iterable[Expr]:
        total = c10d.wait_tensor(c10d.all_reduce(x, op, group))
        return [Expr(encode, (total, form, last), {}) for encode in ENCODERS]

    def check(self, m: Match, constants: Constants) -> None:
        collective = issued_by(m.nodes[-2])
        require(m.op in SUMS, f"a {m.op} cannot be taken over payloads")
        coded = payload_of(collective, 1)
        world_of(collective)
        require(not coded.wire.stochastic, "every rank would round its part of the sum with the same random numbers")
        require(str(coded.wire) == m.form, f"the sum is rounded as {m.form} and its terms as {coded.wire}")
        require(
            not coded.wire.hadamard or holds(coded.numel % coded.wire.row == 0),
            "the last row is not full, and rotating it would mix its padding into the values",
        )

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        wait = m.nodes[-2]
        collective = issued_by(wait)
        world, coded = world_of(collective), payload_of(collective, 1)
        wire, group = coded.wire, collective.group
        sent = coded.payload
        (size,) = sizes(edit, sent, like=wait, before=collective.node)
        shares = Partition(size // wire.width, world, wire)
        padding = shares.payload_bytes - size
        if padding != 0:
            pad = [0, argument(padding)]
            sent = edit.call(aten.constant_pad_nd.default, sent, pad, like=wait, before=collective.node)
        issue = exchange(edit, collective, sent, f"all_to_all of {coded.form}, summed, all_gather", world)
        place = {"like": wait, "before": m.root}
        parts = wait_for(edit, issue, like=wait, before=wait)
        own = (shares.share,)
        total = reduced(edit, parts, wire, world, own, torch.float32, m.op == "avg", **place)
        encode: Any = m.root.target
        payload = edit.call(encode, total, *m.root.args[1:], **place)
        gathered = edit.call(ops.all_gather_into_tensor.default, payload, world, group, **place)
        payloads = wait_for(edit, gathered, **place)
        return edit.call(aten.slice.Tensor, payloads, 0, 0, argument(size), **place) if padding != 0 else payloads
