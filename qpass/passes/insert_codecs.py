"""Decide which collectives may lose precision, and write it into the graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpass.comm.policy import Policy
from qpass.comm.schedule import shots
from qpass.graph.edit import Editor
from qpass.graph.record import record_of, set_record
from qpass.passes.annotate import describe
from qpass.passes.frame import Pass
from qpass.patterns.reduce_scatter import SUMS
from qpass.rewrite.coded import ENCODE, as_coded, decoded, encoded
from qpass.rewrite.collective import EVEN_KEY, Collective, as_collective, is_other_collective
from qpass.rewrite.rule import Refusal, require
from qpass.rewrite.transfer import world_of


@dataclass(frozen=True)
class InsertCodecs(Pass):
    """``collective(x)  ->  collective(decode(encode(x)))`` where the policy wants it; else the record says why not.

    The sum of an all_reduce that would send fewer bytes in two transfers is rounded, too:
    ``wait(all_reduce(x))  ->  decode(encode(wait(all_reduce(decode(encode(x))))))``.
    """

    policy: Policy

    def run(self, gm: fx.GraphModule) -> int:
        edit = Editor(gm, self.name)
        count = 0
        for node in list(gm.graph.nodes):
            collective = as_collective(node)
            if collective is not None:
                count += self._visit(collective, edit)
            elif is_other_collective(node):
                _leave(node, "this form of collective is not compressed", asked=True)
        return count

    def _visit(self, collective: Collective, edit: Editor) -> int:
        node, x = collective.node, collective.x.meta["val"]
        if as_coded(collective.x) is not None or collective.x.target is ENCODE:  # decided by somebody else
            return 0
        if not x.dtype.is_floating_point:
            narrowed = record_of(node) is not None  # by a rule
            reason = f"values of {str(x.dtype).removeprefix('torch.')} travel as they are"
            return 0 if narrowed else _leave(node, reason, asked=False)
        try:
            require(all(isinstance(size, int) for size in x.shape), "its size is symbolic")
            world = world_of(collective)
            numel = x.numel() * (world if collective.kind == "all_gather" else 1)
            decision = self.policy.decide(collective.kind, numel, x.dtype, world)
            if not decision:
                return _leave(node, decision.reason, asked=False)
            _check(collective)
        except Refusal as refusal:
            return _leave(node, refusal.reason, asked=collective.kind in self.policy.kinds)
        wire = self.policy.codec
        parts = world if collective.kind in ("all_to_all", "reduce_scatter") else 1
        place = {"like": node, "before": node}
        payload = encoded(edit, collective.x, wire, parts, **place)
        value = decoded(edit, payload, wire, parts, x.shape, x.dtype, **place)
        node.replace_input_with(collective.x, value)
        if collective.kind == "all_reduce" and shots(x.numel(), wire, world) == "two_shot":
            _round_sum(collective, self.policy, edit)
        node.meta[EVEN_KEY] = True
        set_record(node, describe(node, "quantized").but(op=collective.kind, kernel=str(wire), asked=True))
        return 1


def _check(collective: Collective) -> None:
    """Refuse what no rule of the catalogue sends as payloads."""
    require(collective.wait is not None, "its result is read without being waited for, or more than once")
    if collective.kind in ("all_reduce", "reduce_scatter"):
        require(collective.op in SUMS, f"a {collective.op} cannot be taken over payloads")
    require(collective.is_even, "its parts are not equal")


def _round_sum(collective: Collective, policy: Policy, edit: Editor) -> None:
    wait = collective.wait
    assert wait is not None
    val, readers = wait.meta["val"], list(wait.users)
    place = {"like": wait, "before": wait.next}
    payload = edit.call(ENCODE, wait, str(policy.codec), **place)
    value = decoded(edit, payload, policy.codec, 1, val.shape, val.dtype, **place)
    for reader in readers:
        reader.replace_input_with(wait, value)


def _leave(node: fx.Node, reason: str, asked: bool) -> int:
    known, found = record_of(node), as_collective(node)
    if known is not None and known.outcome == "lowered":  # narrowed by a rule, which is worth more to know
        return 0
    record = describe(node, "float", reason=reason).but(asked=asked)
    set_record(node, record.but(op=found.kind) if found is not None else record)
    return 0
