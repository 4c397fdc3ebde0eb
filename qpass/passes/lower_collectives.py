"""Send payloads instead of the values that were decoded from them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpass.graph.record import record_of, set_record
from qpass.passes.frame import Pass
from qpass.patterns import COLLECTIVES
from qpass.rewrite.collective import KINDS
from qpass.rewrite.rule import apply_rules


@dataclass(frozen=True)
class LowerCollectives(Pass):
    """``wait(collective(decode(p)))  ->  decode(wait(collective(p)))`` by the catalogue's rules; exact as they say.

    Transfers start and are waited for where they were, so what overlapped with them still does.
    """

    def run(self, gm: fx.GraphModule) -> int:
        walks = [apply_rules(gm, rules, self.name) for rules in COLLECTIVES]
        reasons = {node: reason for walk in walks for _, node, reason in walk.refused if not node._erased}
        for node, reason in reasons.items():
            record = record_of(node) if node.target in KINDS else None
            if record is not None and record.outcome == "quantized":
                set_record(node, record.but(reason=reason))
        return sum(walk.count for walk in walks)
