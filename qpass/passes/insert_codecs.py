"""Decide which collectives may lose precision, and write it into the graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpass.comm.codec import Codec
from qpass.comm.cost import Decision
from qpass.comm.group import process_group
from qpass.comm.override import Place, Seen
from qpass.comm.policy import Policy
from qpass.comm.schedule import shots
from qpass.graph.edit import Editor
from qpass.graph.record import record_of, set_record
from qpass.graph.source import module_stack
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

    ``backward`` says which of the two graphs of a training step this is.
    """

    policy: Policy
    backward: bool = False

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
        node, x, policy = collective.node, collective.x.meta["val"], self.policy
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
            resolved = policy.resolve(_place(collective, self.backward), numel, x.dtype)
            if isinstance(resolved, Decision):
                return _leave(node, resolved.reason, asked=False)
            policy = resolved
            decision = policy.decide(collective.kind, numel, x.dtype, world)
            if not decision:
                return _leave(node, decision.reason, asked=False)
            _check(collective)
        except Refusal as refusal:
            return _leave(node, refusal.reason, asked=collective.kind in policy.kinds)
        wire = policy.codec
        parts = world if collective.kind in ("all_to_all", "reduce_scatter") else 1
        place = {"like": node, "before": node}
        payload = encoded(edit, collective.x, wire, parts, **place)
        value = decoded(edit, payload, wire, parts, x.shape, x.dtype, **place)
        node.replace_input_with(collective.x, value)
        if collective.kind == "all_reduce" and shots(x.numel(), wire, world) == "two_shot":
            _round_sum(collective, wire, edit)
        node.meta[EVEN_KEY] = True
        record = describe(node, "quantized").but(op=collective.kind, kernel=str(wire), asked=True)
        set_record(node, record.but(group=collective.group_name))
        return 1


def _check(collective: Collective) -> None:
    """Refuse what no rule of the catalogue sends as payloads."""
    require(collective.wait is not None, "its result is read without being waited for, or more than once")
    if collective.kind in ("all_reduce", "reduce_scatter"):
        require(collective.op in SUMS, f"a {collective.op} cannot be taken over payloads")
    require(collective.is_even, "its parts are not equal")


def _round_sum(collective: Collective, wire: Codec, edit: Editor) -> None:
    wait = collective.wait
    assert wait is not None
    val, readers = wait.meta["val"], list(wait.users)
    place = {"like": wait, "before": wait.next}
    payload = edit.call(ENCODE, wait, str(wire), **place)
    value = decoded(edit, payload, wire, 1, val.shape, val.dtype, **place)
    for reader in readers:
        reader.replace_input_with(wait, value)


def _leave(node: fx.Node, reason: str, asked: bool) -> int:
    known, found = record_of(node), as_collective(node)
    if known is not None and known.outcome == "lowered":  # narrowed by a rule, which is worth more to know
        return 0
    record = describe(node, "float", reason=reason).but(asked=asked)
    set_record(node, record.but(op=found.kind, group=found.group_name) if found is not None else record)
    return 0


def seen_in(gm: fx.GraphModule, policy: Policy, backward: bool) -> Seen:
    """What the overrides of ``policy`` can be held against in a graph, and which of them hold for a collective."""
    seen = Seen(backward)
    for node in gm.graph.nodes:
        collective = as_collective(node)
        if collective is not None:
            seen.note(_place(collective, backward), policy.overrides)
    return seen


def _place(collective: Collective, backward: bool) -> Place:
    modules = tuple(path for path, _ in module_stack(collective.node) if path)
    return Place(collective.kind, _names_of(collective.group_name), modules, backward)


def _names_of(group: str) -> tuple[str, ...]:
    """The names of a process group: its own, and its description where this process is in it and it has one."""
    found = process_group(group)
    described = found.group_desc if found is not None else ""
    return tuple(name for name in (group, described) if name not in ("", "undefined"))
