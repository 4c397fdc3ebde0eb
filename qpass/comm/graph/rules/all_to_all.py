"""A part for every rank: payloads instead of values.

All three laws send the same bytes, each part as a payload of its own, so ranks need not be under the same one.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.comm.graph.coded import decoded, shape_of
from qpass.comm.graph.collective import PARTS_KEY, c10d, ops
from qpass.comm.graph.parts import as_coded_parts, decoded_parts, fills_rows, joined
from qpass.comm.graph.transfer import exchange, issued_by, payload_of, result_shape, send, wait_for, world_of
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.expression import Expr, aten
from qpass.ir.match import Match
from qpass.ir.rule import Refusal, Rule, require
from qpass.ir.sizes import arguments, product, size


class ExchangeRows(Rule):
    """wait(all_to_all(decode(p), outputs, inputs))  ->  decode(wait(all_to_all(p, outputs * bytes, inputs * bytes)))

    Exact where what stands behind the first dimension fills whole rows of the payload: any cut is one between rows.
    """

    def pattern(self, x: Any, outputs: Any, inputs: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.all_to_all_single(x, outputs, inputs, group))

    def check(self, m: Match, constants: Constants) -> None:
        coded = payload_of(issued_by(m.root), 1)
        row = coded.wire.row
        require(fills_rows(m.x, coded.wire), f"what its parts are made of fills no whole rows of {row} elements")

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        coded, dtype = payload_of(collective, 1), m.root.meta["val"].dtype
        here: Any = {"like": m.root, "before": collective.node}
        rest = shape_of(edit, m.x, **here)[1:]
        each = product(rest) // coded.wire.row * coded.wire.width
        outputs, inputs = ([size(edit, split, **here) for split in splits] for splits in (m.outputs, m.inputs))
        bytes_out, bytes_in = (arguments(each * split for split in splits) for splits in (outputs, inputs))
        how = f"all_to_all of {coded.wire}"
        issue = send(edit, collective, coded.payload, how, ops.all_to_all_single.default, bytes_out, bytes_in)
        place: Any = {"like": m.root, "before": m.root}
        payloads = wait_for(edit, issue, **place)
        return decoded(edit, payloads, coded.wire, 1, result_shape(edit, collective, **place), dtype, **place)


class ExchangePayloads(Rule):
    """wait(all_to_all(decode(p)))  ->  decode(wait(all_to_all(p))), p being a payload for each rank

    Exact where the parts are equal here and coded one by one everywhere.
    """

    def pattern(self, x: Any, outputs: Any, inputs: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.all_to_all_single(x, outputs, inputs, group))

    def check(self, m: Match, constants: Constants) -> None:
        collective = issued_by(m.root)
        require(collective.is_even, "its parts are not equal")
        require(collective.node.meta.get(PARTS_KEY), "nothing promises that every rank codes each part by itself")
        payload_of(collective, world_of(collective))

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        world, dtype, place = world_of(collective), m.root.meta["val"].dtype, {"like": m.root, "before": m.root}
        coded = payload_of(collective, world)
        issue = exchange(edit, collective, coded.payload, f"all_to_all of {coded.wire}", world)
        payloads = wait_for(edit, issue, **place)
        return decoded(edit, payloads, coded.wire, world, result_shape(edit, collective, **place), dtype, **place)


class ExchangeParts(Rule):
    """wait(all_to_all(cat(decode(p), ..)))  ->  cat(decode(payload), ..) of wait(all_to_all(cat(p, ..)))

    Exact where each decoded value is the part of one rank.
    """

    def pattern(self, parts: Any, outputs: Any, inputs: Any, group: Any) -> Expr:
        return c10d.wait_tensor(c10d.all_to_all_single(aten.cat(parts, 0), outputs, inputs, group))

    def check(self, m: Match, constants: Constants) -> None:
        collective = issued_by(m.root)
        parts = as_coded_parts(m.parts)
        if parts is None:
            raise Refusal("its parts were not all decoded from payloads of one format", collective.node)
        require(collective.node.meta.get(PARTS_KEY), "nothing promises that every rank codes each part by itself")
        assert len(parts) == len(m.inputs), "whoever promised coded another number of parts"

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        collective = issued_by(m.root)
        parts, dtype = as_coded_parts(m.parts), m.root.meta["val"].dtype
        assert parts is not None
        wire = parts[0].wire
        here: Any = {"like": m.root, "before": collective.node}
        rest = shape_of(edit, m.parts[0], **here)[1:]
        outputs = [size(edit, split, **here) for split in m.outputs]
        bytes_out = arguments(wire.payload_bytes(product((split, *rest))) for split in outputs)
        payload, bytes_in = joined(edit, [part.payload for part in parts], **here)
        how = f"all_to_all of {wire}"
        issue = send(edit, collective, payload, how, ops.all_to_all_single.default, bytes_out, bytes_in)
        place: Any = {"like": m.root, "before": m.root}
        payloads = wait_for(edit, issue, **place)
        return decoded_parts(edit, payloads, bytes_out, outputs, rest, wire, dtype, **place)
