"""What every collective rule does: it sends a payload where values were sent, and waits for it where they were.

Bytes are what travels, since every transport carries uint8 and none does arithmetic on it.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.graph.edit import Editor
from qpass.graph.record import NodeRecord, record_of, set_record
from qpass.graph.sizes import argument, is_symbolic, sizes
from qpass.rewrite.coded import Coded, as_coded
from qpass.rewrite.collective import WAIT, Collective, as_collective, ops
from qpass.rewrite.rule import Refusal, require


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


def send(edit: Editor, collective: Collective, payload: fx.Node, how: str, target: Any, *args: Any) -> fx.Node:
    """Start ``target(payload, *args, group)`` in the collective's place; its record says what went instead of what."""
    issue = edit.call(target, payload, *args, collective.group, like=collective.node, before=collective.node)
    known = record_of(collective.node) or NodeRecord(collective.kind, "quantized")
    set_record(issue, known.but(outcome="lowered", kernel=how, reason=saved(collective.x, payload)))
    return issue


def exchange(edit: Editor, collective: Collective, payload: fx.Node, how: str, world: int) -> fx.Node:
    """Start an all_to_all of ``world`` equal parts of a payload in the collective's place, recorded as `send` does."""
    (size,) = sizes(edit, payload, like=collective.node, before=collective.node)
    splits = [argument(size // world)] * world
    return send(edit, collective, payload, how, ops.all_to_all_single.default, splits, splits)


def wait_for(edit: Editor, issue: fx.Node, *, like: fx.Node, before: fx.Node) -> fx.Node:
    """Wait for a transfer at the place of ``before``."""
    return edit.call(WAIT, issue, like=like, before=before)


def saved(values: fx.Node, payload: fx.Node) -> str:
    """What went instead of what, in words: bytes, as far as sizes are known."""
    before, after = (val.numel() * val.element_size() for val in (values.meta["val"], payload.meta["val"]))
    if is_symbolic(before) or is_symbolic(after):
        return f"{before} -> {after} bytes"
    return f"{before:,} -> {after:,} bytes"
