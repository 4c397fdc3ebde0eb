"""The rules of collectives: each sends a payload, or codes, in the place of values."""

from __future__ import annotations

from qpass.comm.graph.rules.all_gather import CastBeforeGather, GatherPayloads
from qpass.comm.graph.rules.all_reduce import AllReduceOneShot, AllReduceTwoShot
from qpass.comm.graph.rules.all_to_all import ExchangeParts, ExchangePayloads, ExchangeRows
from qpass.comm.graph.rules.broadcast import BroadcastPayload
from qpass.comm.graph.rules.codes import GatherScales, MoveCodes, QuantizeBeforeGather
from qpass.comm.graph.rules.reduce_scatter import ReduceScatterPayloads
from qpass.ir.rule import Rule

COLLECTIVES: tuple[tuple[Rule, ...], ...] = (
    (AllReduceTwoShot(),),
    (
        AllReduceOneShot(), BroadcastPayload(), CastBeforeGather(), ExchangeParts(), ExchangePayloads(), ExchangeRows(),
        GatherPayloads(), GatherScales(), MoveCodes(), QuantizeBeforeGather(), ReduceScatterPayloads(),
    ),
)  # fmt: skip
"""What is sent as payloads, walk after walk: an all_reduce goes in two shots where it may, else in one."""
