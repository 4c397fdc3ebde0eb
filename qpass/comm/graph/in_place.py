"""Collectives that write into a tensor, turned into ones that return a new tensor and a copy after the wait.

    wait(all_reduce_(x))                     x holds the sum afterwards
    copy_(x, sum := wait(all_reduce(x)))     and so it does here

Nothing may read what a transfer writes to before the wait, so writing later changes nothing.

What AOTAutograd makes of an operator with an output, ``auto_functionalized_v2(all_gather_into_tensor_out, x)``, writes
to nothing that anybody knows of: it becomes ``all_gather(x)``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from qpass.comm.graph.collective import (
    FUNCTIONALIZED,
    WAIT,
    WORLD_KEY,
    Collective,
    arguments_of,
    as_collective,
    operator_of,
    ops,
    world_in,
)
from qpass.ir.editor import Editor
from qpass.ir.match import argument_names
from qpass.ir.rule import require
from qpass.ir.sizes import is_known

IN_PLACE: dict[Any, tuple[str, Any]] = {
    ops.all_gather_into_tensor_out.default: ("all_gather", ops.all_gather_into_tensor.default),
    ops.all_reduce_.default: ("all_reduce", ops.all_reduce.default),
    ops.broadcast_.default: ("broadcast", ops.broadcast.default),
    ops.reduce_scatter_tensor_out.default: ("reduce_scatter", ops.reduce_scatter_tensor.default),
}
"""Operator -> its kind, and the operator that returns a new tensor."""


def as_in_place(node: fx.Node) -> Collective:
    """The reading of one of `IN_PLACE`, wrapped or not.

    Raises:
        Refusal: its output is not what a collective with a new one returns.
    """
    given = arguments_of(node)
    kind, _ = IN_PLACE[operator_of(node)]
    found = Collective(node, kind, given["input"], given.get("reduce_op", ""), given["group_name"], world_in(node))
    is_tuple = node.target in FUNCTIONALIZED and "out" in given  # of the older wrapper, which copies its output
    require(not is_tuple, "this form of collective is not compressed")
    require(_is_as_new(found), "its output has another shape than what is received")
    return found


def as_functional(edit: Editor, collective: Collective) -> Collective:
    """The same collective with a new tensor for its result, in the place of one of `IN_PLACE` that is waited for."""
    node, wait = collective.node, collective.wait
    assert wait is not None
    given = arguments_of(node)
    _, target = IN_PLACE[operator_of(node)]
    issue = edit.call(target, *(given[name] for name in argument_names(target)), like=node, before=node)
    issue.meta[WORLD_KEY] = collective.world
    result = edit.call(WAIT, issue, like=wait, before=wait)
    if node.target not in FUNCTIONALIZED:
        written = given.get("out", given["input"])
        edit.call(torch.ops.aten.copy_.default, written, result, like=wait, before=wait)
    wait.replace_all_uses_with(result)
    edit.graph.erase_node(wait)
    edit.graph.erase_node(node)
    found = as_collective(issue)
    assert found is not None
    return found


def read_after_wait(node: fx.Node) -> None:
    """Let what reads results behind their wait, where they are the same tensors, read what the wait returns."""
    for result in (node, *(item for item in node.users if item.target is operator.getitem)):
        waits = [reader for reader in result.users if reader.target is WAIT]
        for reader in list(result.users):
            if len(waits) == 1 and waits[0] < reader:
                reader.replace_input_with(result, waits[0])


def _is_as_new(found: Collective) -> bool:
    """Whether what it writes to has the shape of what a collective without an output returns."""
    if found.kind not in ("all_gather", "reduce_scatter") or found.world is None:
        return True
    given = arguments_of(found.node)
    stated = [size.meta["val"] if isinstance(size, fx.Node) else size for size in given.get("_out_size", ())]
    part, whole = found.x.meta["val"].shape, given["out"].meta["val"].shape if "out" in given else stated
    if found.kind == "reduce_scatter":
        part, whole = whole, part
    expected = (part[0] * found.world, *part[1:]) if len(part) else ()
    return len(expected) == len(whole) and all(is_known(a == b) for a, b in zip(expected, whole, strict=True))
