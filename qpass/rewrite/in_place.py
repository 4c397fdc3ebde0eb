"""Collectives that write into a tensor: as those that return a new one, and a copy where they are waited for.

    wait(all_reduce_(x))                     x holds the sum afterwards
    copy_(x, sum := wait(all_reduce(x)))     and so it does here

Until a transfer was waited for nobody may read what it writes to, so writing later changes nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.graph.edit import Editor
from qpass.rewrite.collective import WAIT, WORLD_KEY, Collective, as_collective, ops, world_in
from qpass.rewrite.match import argument_names, normalized

IN_PLACE: dict[Any, tuple[str, Any]] = {
    ops.all_gather_into_tensor_out.default: ("all_gather", ops.all_gather_into_tensor.default),
    ops.all_reduce_.default: ("all_reduce", ops.all_reduce.default),
    ops.broadcast_.default: ("broadcast", ops.broadcast.default),
    ops.reduce_scatter_tensor_out.default: ("reduce_scatter", ops.reduce_scatter_tensor.default),
}
"""Operator -> its kind, and the operator that returns a new tensor."""


def as_in_place(node: fx.Node) -> Collective:
    """The reading of one of `IN_PLACE`."""
    given = normalized(node)
    kind, _ = IN_PLACE[node.target]
    return Collective(node, kind, given["input"], given.get("reduce_op", ""), given["group_name"], world_in(node))


def as_functional(edit: Editor, collective: Collective) -> Collective:
    """The same collective with a new tensor for its result, in the place of one of `IN_PLACE` that is waited for."""
    node, wait = collective.node, collective.wait
    assert wait is not None
    given = normalized(node)
    _, target = IN_PLACE[node.target]
    issue = edit.call(target, *(given[name] for name in argument_names(target)), like=node, before=node)
    issue.meta[WORLD_KEY] = collective.world
    result = edit.call(WAIT, issue, like=wait, before=wait)
    written = given.get("out", given["input"])
    edit.call(torch.ops.aten.copy_.default, written, result, like=wait, before=wait)
    wait.replace_all_uses_with(result)
    edit.graph.erase_node(wait)
    edit.graph.erase_node(node)
    found = as_collective(issue)
    assert found is not None
    return found
