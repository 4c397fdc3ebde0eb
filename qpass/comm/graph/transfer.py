"""Sending a payload in the place of values, and waiting for it where the values were waited for.

A payload is sent as uint8: every transport carries it, and none does arithmetic on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.comm.graph.coded import Coded, as_coded, shape_of
from qpass.comm.graph.collective import SENT_KEY, UNFED_KEY, WAIT, Collective, as_collective, ops
from qpass.ir.editor import Editor
from qpass.ir.match import normalized
from qpass.ir.record import NodeRecord, record_of, set_record
from qpass.ir.rule import Refusal, require
from qpass.ir.sizes import Size, argument, is_symbolic, size, sizes, total

aten = torch.ops.aten


def payload_of(collective: Collective, parts: int) -> Coded:
    """The payload that a collective's values were decoded from.

    Raises:
        Refusal: they were not, or it does not come apart into ``parts`` payloads.
    """
    coded = as_coded(collective.x)
    if coded is None:
        raise Refusal("the values that are sent were not decoded from a payload", collective.node)
    require(coded.holds(parts), f"the payload does not come apart into {parts} payloads", collective.node)
    return coded


def world_of(collective: Collective) -> int:
    """The number of ranks; refuses where it is not known."""
    if collective.world is None:
        raise Refusal("the number of ranks in its group is not known", collective.node)
    return collective.world


def issued_by(wait: fx.Node) -> Collective:
    """The collective that a matched ``wait_tensor`` waits for."""
    found = as_collective(wait.args[0])
    assert found is not None
    return found


def result_shape(edit: Editor, collective: Collective, *, like: fx.Node, before: fx.Node) -> list[int | Size]:
    """The shape of what a collective gives, by the sizes of what it sends."""
    first, *rest = shape_of(edit, collective.x, like=like, before=before) or [1]
    if collective.kind == "all_gather":
        return [first * world_of(collective), *rest]
    if collective.kind == "reduce_scatter":
        return [first // world_of(collective), *rest]
    if collective.kind == "all_to_all":
        splits = normalized(collective.node)["output_split_sizes"]
        return [total(size(edit, split, like=like, before=before) for split in splits), *rest]
    return [first, *rest] if collective.x.meta["val"].dim() else []


def free_of_sizes(edit: Editor, collective: Collective) -> None:
    """Read the sizes of a result that is still being sent from what is sent. Then only the wait reads the result."""
    for reader in list(collective.node.users):
        if reader.target is aten.sym_size.int:
            place: Any = {"like": reader, "before": collective.node}
            node = argument(result_shape(edit, collective, **place)[normalized(reader)["dim"]])
            assert isinstance(node, fx.Node)
            reader.replace_all_uses_with(node)
            edit.graph.erase_node(reader)


def send(edit: Editor, collective: Collective, payload: fx.Node, how: str, target: Any, *args: Any) -> fx.Node:
    """Start ``target(payload, *args, group)`` in the collective's place. Its record says what is sent instead."""
    issue = edit.call(target, payload, *args, collective.group, like=collective.node, before=collective.node)
    known = record_of(collective.node) or NodeRecord(collective.kind, "quantized", group=collective.group_name)
    set_record(issue, known.but(outcome="lowered", kernel=how, reason=saved(collective, payload)))
    return issue


def exchange(edit: Editor, collective: Collective, payload: fx.Node, how: str, world: int) -> fx.Node:
    """Start an all_to_all of ``world`` equal parts of a payload in the collective's place, recorded as `send` does."""
    (length,) = sizes(edit, payload, like=collective.node, before=collective.node)
    splits = [argument(length // world)] * world
    return send(edit, collective, payload, how, ops.all_to_all_single.default, splits, splits)


def wait_for(edit: Editor, issue: fx.Node, *, like: fx.Node, before: fx.Node) -> fx.Node:
    """Wait for a transfer at the place of ``before``."""
    return edit.call(WAIT, issue, like=like, before=before)


def saved(collective: Collective, payload: fx.Node) -> str:
    """What was sent instead of what, in words: the bytes, where sizes are known, and why there is no error feedback."""
    values, codes = collective.x.meta["val"], payload.meta["val"]
    before = collective.node.meta.get(SENT_KEY, values.numel() * values.element_size())
    after = codes.numel() * codes.element_size()
    why = collective.node.meta.get(UNFED_KEY)
    note = f"; no error feedback: {why}" if why else ""
    if is_symbolic(before) or is_symbolic(after):
        return f"{before} -> {after} bytes{note}"
    return f"{before:,} -> {after:,} bytes{note}"
