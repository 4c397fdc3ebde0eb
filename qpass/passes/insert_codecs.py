"""Decide which collectives may lose precision, and write it into the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.comm.codec import Codec
from qpass.comm.policy import LARGE, Policy
from qpass.comm.schedule import shots
from qpass.graph.edit import Editor
from qpass.graph.record import record_of, set_record
from qpass.graph.sizes import is_data_dependent, is_known, sizes
from qpass.passes.annotate import describe
from qpass.passes.frame import Pass
from qpass.patterns.reduce_scatter import SUMS
from qpass.rewrite.coalesced import COALESCED, NOT_WAITED, as_bucket, as_coalesced
from qpass.rewrite.coded import ENCODE, as_coded, decoded, encoded
from qpass.rewrite.collective import PARTS_KEY, Collective, as_collective, is_other_collective
from qpass.rewrite.in_place import IN_PLACE, as_functional, as_in_place
from qpass.rewrite.match import normalized
from qpass.rewrite.parts import coded_parts, fills_rows
from qpass.rewrite.rule import Refusal, require
from qpass.rewrite.transfer import free_of_sizes, world_of


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
                free_of_sizes(edit, collective)
                count += self._visit(collective, edit)
            elif node.target in IN_PLACE:
                count += self._visit(as_in_place(node), edit)
            elif node.target in COALESCED:
                count += self._visit_list(node, edit)
            elif is_other_collective(node):
                _leave(node, "this form of collective is not compressed", asked=True)
        return count

    def _visit_list(self, node: fx.Node, edit: Editor) -> int:
        kind, _ = COALESCED[node.target]
        try:
            found = as_coalesced(node)
            if not found.dtype.is_floating_point:
                return _leave(node, f"values of {_name(found.dtype)} travel as they are", asked=False)
            numel = found.numel * (found.world if kind == "all_gather" else 1)
            size = None if is_data_dependent(numel) else numel
            decision = self.policy.decide(kind, size, found.dtype, found.world)
            if not decision:
                return _leave(node, decision.reason, asked=False)
            _check_sum(kind, found.op)
        except Refusal as refusal:
            return _leave(node, refusal.reason, asked=kind in self.policy.kinds)
        bucket = as_collective(as_bucket(edit, found, self.policy.codec))
        assert bucket is not None
        return self._visit(bucket, edit)

    def _visit(self, collective: Collective, edit: Editor) -> int:
        node, x = collective.node, collective.x.meta["val"]
        known = record_of(node)
        is_done = known is not None and known.outcome == "quantized"
        if is_done or as_coded(collective.x) is not None or collective.x.target is ENCODE:  # by somebody else
            return 0
        if not x.dtype.is_floating_point:
            narrowed = known is not None  # by a rule
            reason = f"values of {_name(x.dtype)} travel as they are"
            return 0 if narrowed else _leave(node, reason, asked=False)
        try:
            world = world_of(collective)
            numel = _agreed_size(collective, world)
            decision = self.policy.decide(collective.kind, numel, x.dtype, world)
            if not decision:
                return _leave(node, decision.reason, asked=False)
            _check(collective, world)
        except Refusal as refusal:
            return _leave(node, refusal.reason, asked=collective.kind in self.policy.kinds)
        if node.target in IN_PLACE:
            collective = as_functional(edit, collective)
            node = collective.node
        wire = self.policy.codec
        node.replace_input_with(collective.x, _rounded(edit, collective, wire, world))
        if collective.kind == "all_reduce" and shots(LARGE if numel is None else numel, wire, world) == "two_shot":
            _round_sum(collective, self.policy, edit)
        set_record(node, describe(node, "quantized").but(op=collective.kind, kernel=str(wire), asked=True))
        return 1


def _check(collective: Collective, world: int) -> None:
    """Refuse what no rule of the catalogue sends as payloads."""
    require(collective.wait is not None, NOT_WAITED)
    _check_sum(collective.kind, collective.op)
    numel = collective.x.meta["val"].numel()
    if collective.kind == "reduce_scatter" and is_data_dependent(numel):
        require(is_known(numel % world == 0), f"its {numel} elements are not known to make {world} equal parts")


def _check_sum(kind: str, op: str) -> None:
    if kind in ("all_reduce", "reduce_scatter"):
        require(op in SUMS, f"a {op} cannot be taken over payloads")


def _rounded(edit: Editor, collective: Collective, wire: Codec, world: int) -> fx.Node:
    """What is sent, decoded from a payload; where each rank gets a part of its own, each part from one of its own."""
    node, x = collective.node, collective.x
    place: Any = {"like": node, "before": node}
    parts = world if collective.kind == "reduce_scatter" else 1
    if collective.kind == "all_to_all":
        node.meta[PARTS_KEY] = True
        if not fills_rows(x, wire):
            splits = normalized(node)["input_split_sizes"]
            if not collective.is_even or is_data_dependent(x.meta["val"].numel()):
                return coded_parts(edit, x, splits, wire, **place)
            parts = world
    payload = encoded(edit, x, wire, parts, **place)
    return decoded(edit, payload, wire, parts, sizes(edit, x, **place), x.meta["val"].dtype, **place)


def _agreed_size(collective: Collective, world: int) -> int | torch.SymInt | None:
    """Elements of the whole tensor, or None where no rank can know what the others see."""
    numel = collective.x.meta["val"].numel() * (world if collective.kind == "all_gather" else 1)
    return None if collective.kind == "all_to_all" or is_data_dependent(numel) else numel


def _round_sum(collective: Collective, policy: Policy, edit: Editor) -> None:
    wait = collective.wait
    assert wait is not None
    dtype, readers = wait.meta["val"].dtype, list(wait.users)
    place: Any = {"like": wait, "before": wait.next}
    payload = edit.call(ENCODE, wait, str(policy.codec), **place)
    shape = sizes(edit, collective.x, **place)  # not of the sum, which has one reader that way
    value = decoded(edit, payload, policy.codec, 1, shape, dtype, **place)
    for reader in readers:
        reader.replace_input_with(wait, value)


def _leave(node: fx.Node, reason: str, asked: bool) -> int:
    known, found = record_of(node), as_in_place(node) if node.target in IN_PLACE else as_collective(node)
    if known is not None and known.outcome == "lowered":  # narrowed by a rule, which is worth more to know
        return 0
    record = describe(node, "float", reason=reason).but(asked=asked)
    set_record(node, record.but(op=found.kind) if found is not None else record)
    return 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
