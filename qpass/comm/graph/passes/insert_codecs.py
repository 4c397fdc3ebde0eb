"""InsertCodecs decides which collectives may lose precision, and writes it into the graph."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx

from qpass.arithmetic.numerics import dtype_name
from qpass.comm.eager.group import process_group
from qpass.comm.eager.schedule import shots
from qpass.comm.graph.coalesced import COALESCED, NOT_WAITED, WRITING, Coalesced, as_bucket, as_coalesced
from qpass.comm.graph.coded import CAST_FED, ENCODE_FED, ENCODERS, as_coded, decoded, encoded
from qpass.comm.graph.collective import (
    KINDS,
    PARTS_KEY,
    SENT_KEY,
    SUMS,
    UNFED_KEY,
    Collective,
    as_collective,
    group_name,
    is_other_collective,
    operator_of,
)
from qpass.comm.graph.gradient import gradient_name
from qpass.comm.graph.in_place import IN_PLACE, as_functional, as_in_place, read_after_wait
from qpass.comm.graph.parts import coded_parts, fills_rows
from qpass.comm.graph.transfer import free_of_sizes
from qpass.comm.policy.collective_override import OverrideMatches, Place
from qpass.comm.policy.cost import Decision
from qpass.comm.policy.policy import LARGE, Policy
from qpass.comm.wire.codec import Codec
from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import normalized
from qpass.ir.record import describe, record_of, set_record, stands_for_several
from qpass.ir.rule import NotAsked, Refusal, require
from qpass.ir.sizes import is_data_dependent, is_known, sizes
from qpass.ir.source import module_stack

FORMS = {**KINDS, **{target: kind for table in (COALESCED, IN_PLACE) for target, (kind, _) in table.items()}}
"""Operator -> kind, of every form of collective that can be compressed."""


@dataclass(frozen=True)
class InsertCodecs(Pass):
    """``collective(x)  ->  collective(decode(encode(x)))`` where the policy wants it; else the record says why not.

    The sum of an all_reduce that would send fewer bytes in two transfers is rounded, too:
    ``wait(all_reduce(x))  ->  decode(encode(wait(all_reduce(decode(encode(x))))))``. A list of tensors becomes one
    (`qpass.comm.graph.coalesced`), and what is written in place is copied there (`qpass.comm.graph.in_place`).

    ``backward`` says which of the two graphs of a training step this is, ``gradients`` which of its outputs are those
    of parameters, None for all. With a policy's feedback, sums that leave a backward graph as such gradients get
    ``encode_fed`` instead of ``encode``, for both roundings (`qpass.comm.wire.fed_rounding`). Such a sum is decoded as
    float32; where the graph has it narrower, ``cast_fed`` is its last rounding.
    """

    policy: Policy
    backward: bool = False
    gradients: Collection[int] | None = None

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        done = 0
        for node in list(gm.graph.nodes):
            if operator_of(node) in FORMS:
                done += self._visit(node, edit)
            elif is_other_collective(node):
                _leave(node, "this form of collective is not compressed", asked=True)
        return PassResult(done)

    def _visit(self, node: fx.Node, edit: Editor) -> int:
        known, kinds, target = record_of(node), self.policy.kinds, operator_of(node)
        if (known is not None and known.outcome == "quantized") or stands_for_several(node):
            return 0
        if target in (*IN_PLACE, *WRITING):
            read_after_wait(node)
        try:
            found = as_coalesced(node) if node.target in COALESCED else _one(node, edit)
            if isinstance(found, Collective) and (as_coded(found.x) is not None or found.x.target in ENCODERS):
                return 0  # decided before
            if known is not None and not found.dtype.is_floating_point:  # narrowed by a rule
                return 0
            policy = self._wanted(found)
            kinds = policy.kinds
            _check(found)
        except Refusal as refusal:
            return _leave(node, refusal.reason, asked=FORMS[target] in kinds and not isinstance(refusal, NotAsked))
        if isinstance(found, Coalesced):
            found = _one(as_bucket(edit, found, policy.codec), edit)
        elif target in IN_PLACE:
            found = as_functional(edit, found)
        _round(found, policy.codec, edit, self._state(found))
        record = describe(found.node, "quantized").but(op=found.kind, kernel=str(policy.codec), asked=True)
        set_record(found.node, record.but(group=found.group_name))
        return 1

    def _wanted(self, found: Collective | Coalesced) -> Policy:
        """The policy for one collective. Refuses where the policy wants it plain."""
        if not found.dtype.is_floating_point:
            raise NotAsked(f"values of {dtype_name(found.dtype)} travel as they are")
        if found.world is None:
            raise Refusal("the number of ranks in its group is not known")
        whole = found.numel * (found.world if found.kind == "all_gather" else 1)
        differs = found.kind == "all_to_all" or is_data_dependent(whole)  # no rank can know what the others see
        numel = None if differs else whole
        resolved = self.policy.resolve(_place(found.node, self.backward), numel, found.dtype)
        if isinstance(resolved, Decision):
            raise NotAsked(resolved.reason)
        decision = resolved.decide(found.kind, numel, found.dtype, found.world)
        if not decision:
            raise NotAsked(decision.reason)
        return resolved

    def _state(self, found: Collective) -> str:
        """The name of the residual of a sum that is to have one, else "": then the collective keeps the reason."""
        if self.policy.feedback is None or found.kind not in ("all_reduce", "reduce_scatter"):
            return ""
        try:
            require(self.backward, "it is not a sum of a backward graph")
            require(isinstance(found.numel, int), "its size is symbolic")
            assert found.wait is not None
            name = gradient_name(found.wait, self.gradients)
        except Refusal as refusal:
            found.node.meta[UNFED_KEY] = refusal.reason
            return ""
        taken = {node.args[2] for node in found.node.graph.find_nodes(op="call_function", target=ENCODE_FED)}
        return name if name not in taken else next(f"{name}_{n}" for n in count(1) if f"{name}_{n}" not in taken)


def _one(node: fx.Node, edit: Editor) -> Collective:
    found = as_in_place(node) if operator_of(node) in IN_PLACE else as_collective(node)
    assert found is not None
    free_of_sizes(edit, found)
    return found


def _check(found: Collective | Coalesced) -> None:
    """Refuse a collective that no rule can send as payloads."""
    if found.kind in ("all_reduce", "reduce_scatter"):
        require(found.op in SUMS, f"a {found.op} cannot be taken over payloads")
    if isinstance(found, Coalesced):
        return  # waited for, or it could not be read
    require(found.wait is not None, NOT_WAITED)
    if found.kind == "reduce_scatter" and found.world and is_data_dependent(found.numel):
        is_even = is_known(found.numel % found.world == 0)
        require(is_even, f"its {found.numel} elements are not known to make {found.world} equal parts")


def _round(found: Collective, wire: Codec, edit: Editor, state: str) -> None:
    node, total = found.node, found.wait
    numel = LARGE if is_data_dependent(found.numel) else found.numel
    how = found.kind == "all_reduce" and shots(numel, wire, found.world)  # type: ignore[arg-type]  # both are known here
    narrow = found.dtype if state and found.dtype.itemsize < torch.float32.itemsize else None
    dtype = found.dtype if narrow is None else torch.float32
    if narrow is not None:
        assert total is not None
        node.meta.setdefault(SENT_KEY, found.numel * narrow.itemsize)
        for each in (node, total):
            each.meta["val"] = each.meta["val"].to(torch.float32)
    node.replace_input_with(found.x, _rounded(edit, found, wire, state, dtype))
    if how == "two_shot":
        total = _round_sum(found, wire, edit, f"{state}_sum" if state else "", dtype)
    if narrow is not None:
        assert total is not None
        cast = edit.call(CAST_FED, total, narrow, f"{state}_cast", like=total, before=total.next)
        total.replace_all_uses_with(cast, lambda reader: reader is not cast)


def _rounded(edit: Editor, found: Collective, wire: Codec, state: str, dtype: torch.dtype) -> fx.Node:
    """What is sent, decoded from a payload; where each rank gets a part of its own, each part from one of its own."""
    node, x = found.node, found.x
    place: Any = {"like": node, "before": node}
    parts: Any = found.world if found.kind == "reduce_scatter" else 1
    if found.kind == "all_to_all":
        node.meta[PARTS_KEY] = True
        if not fills_rows(x, wire):
            splits = normalized(node)["input_split_sizes"]
            if not found.is_even or is_data_dependent(found.numel):
                return coded_parts(edit, x, splits, wire, **place)
            parts = found.world
    payload = encoded(edit, x, wire, parts, state, **place)
    return decoded(edit, payload, wire, parts, sizes(edit, x, **place), dtype, **place)


def _round_sum(found: Collective, wire: Codec, edit: Editor, state: str, dtype: torch.dtype) -> fx.Node:
    wait = found.wait
    assert wait is not None
    readers = list(wait.users)
    place: Any = {"like": wait, "before": wait.next}
    payload = encoded(edit, wait, wire, 1, state, **place)
    shape = sizes(edit, found.x, **place)  # not of the sum, which has one reader that way
    value = decoded(edit, payload, wire, 1, shape, dtype, **place)
    for reader in readers:
        reader.replace_input_with(wait, value)
    return value


def _leave(node: fx.Node, reason: str, asked: bool) -> int:
    known = record_of(node)
    if known is not None and known.outcome == "lowered":  # narrowed by a rule, which is worth more to know
        return 0
    record = describe(node, "float", reason=reason).but(asked=asked)
    if operator_of(node) in FORMS:
        record = record.but(op=FORMS[operator_of(node)], group=group_name(node))
    set_record(node, record)
    return 0


def seen_in(gm: fx.GraphModule, policy: Policy, backward: bool) -> OverrideMatches:
    """The names in a graph that overrides of ``policy`` could mean, and the overrides that match a collective."""
    seen = OverrideMatches(backward)
    for node in gm.graph.nodes:
        if operator_of(node) in FORMS:
            seen.note(_place(node, backward), policy.overrides)
    return seen


def _place(node: fx.Node, backward: bool) -> Place:
    modules = tuple(path for path, _ in module_stack(node) if path)
    return Place(FORMS[operator_of(node)], _names_of(group_name(node)), modules, backward)


def _names_of(group: str) -> tuple[str, ...]:
    """The names of a process group: its own, and its description where this process is in it and it has one."""
    found = process_group(group)
    described = found.group_desc if found is not None else ""
    return tuple(name for name in (group, described) if name not in ("", "undefined"))
