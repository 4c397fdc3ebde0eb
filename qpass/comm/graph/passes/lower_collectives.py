"""LowerCollectives sends payloads instead of the values that were decoded from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpass.comm.graph.collective import KINDS
from qpass.comm.graph.rules import COLLECTIVES
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.record import describe, record_of, set_record
from qpass.ir.rule import apply_rules

BY_CODES = ("GatherScales", "MoveCodes", "QuantizeBeforeGather")
"""Rules that match quantized values only. What they refuse is worth knowing in any graph."""


@dataclass(frozen=True)
class LowerCollectives(Pass):
    """``wait(collective(decode(p)))  ->  decode(wait(collective(p)))`` by the catalogue's rules; exact as they say.

    Transfers start and are waited for where they were, so what overlapped with them still does.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        walks = [apply_rules(gm, rules, self.name) for rules in COLLECTIVES]
        reasons = {node: reason for walk in walks for _, node, reason in walk.refused if not node._erased}
        near = {node for walk in walks for rule, node, _ in walk.refused if rule in BY_CODES}
        for node, reason in reasons.items():
            record = record_of(node) if node.target in KINDS else None
            if record is not None and record.outcome == "quantized":
                set_record(node, record.but(reason=reason))
            elif record is None and node in near:
                set_record(node, describe(node, "float", reason=reason).but(op=KINDS[node.target]))
        return PassResult(sum(walk.count for walk in walks))
