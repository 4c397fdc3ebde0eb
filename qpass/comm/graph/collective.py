"""Reading functional collectives: what a node of a graph moves, between how many ranks, and where it is waited for.

issue = _c10d_functional.all_gather_into_tensor(x, 2, "0")     starts the transfer
wait  = _c10d_functional.wait_tensor(issue)                    its result; what stands between overlaps with it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.expression import operators
from qpass.ir.match import normalized
from qpass.torch_private import auto_functionalize

c10d = operators("_c10d_functional")
"""Functional collectives as expressions."""

_ = torch_private.functional_collectives  # registers what the operators return for fake tensors
ops = torch.ops._c10d_functional

FUNCTIONALIZED = (auto_functionalize.auto_functionalized, auto_functionalize.auto_functionalized_v2)
"""The wrappers in which AOTAutograd puts operators that write to their arguments. Inductor removes them."""

KINDS: dict[Any, str] = {
    ops.all_gather_into_tensor.default: "all_gather",
    ops.all_reduce.default: "all_reduce",
    ops.all_to_all_single.default: "all_to_all",
    ops.broadcast.default: "broadcast",
    ops.reduce_scatter_tensor.default: "reduce_scatter",
}
"""Operator -> the kind of collective, as `qpass.comm` names it."""

WAIT = ops.wait_tensor.default

WORLD_KEY = "qpass_world"
"""``meta`` key on a collective: how many ranks its group has, for a graph that names groups this process lacks."""


PARTS_KEY = "qpass_parts"
"""``meta`` key on an all_to_all: every rank codes each part by itself, which no rank's graph can tell of the others."""


SENT_KEY = "qpass_sent"
"""``meta`` key on a collective that stands for another one: the bytes that one would have sent."""


UNFED_KEY = "qpass_unfed"
"""``meta`` key on a sum that is sent without the error feedback that its policy has: why."""


SUMS = ("sum", "avg")
"""The reductions that can be taken over decoded payloads; a maximum could, too, but saves no error."""


@dataclass(frozen=True)
class Collective:
    """One collective that sends one tensor.

    ``x`` is the tensor sent; ``op`` the reduction, ``""`` where there is none; ``group`` a name or whatever else the
    graph holds; ``world`` the number of ranks, None where nothing tells it.
    """

    node: fx.Node
    kind: str
    x: fx.Node
    op: str
    group: Any
    world: int | None

    @property
    def group_name(self) -> str:
        """The name of the process group; ``""`` where the graph does not hold it."""
        return group_name(self.node)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of what is sent."""
        return self.x.meta["val"].dtype

    @property
    def numel(self) -> int | torch.SymInt:
        """The elements of what is sent."""
        return self.x.meta["val"].numel()

    @property
    def wait(self) -> fx.Node | None:
        """The node that waits for the result, when it is the result's only reader."""
        users = list(self.node.users)
        return users[0] if len(users) == 1 and users[0].target is WAIT else None

    @property
    def is_even(self) -> bool:
        """Whether every rank sends as much to every other as it gets; False only for an all_to_all."""
        if self.kind != "all_to_all":
            return True
        given = normalized(self.node)
        return len({*given["output_split_sizes"], *given["input_split_sizes"]}) == 1


def as_collective(node: Any) -> Collective | None:
    """The reading of a collective of one of `KINDS`, or None for any other node."""
    kind = KINDS.get(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else None
    if kind is None:
        return None
    given = normalized(node)
    return Collective(node, kind, given["input"], given.get("reduce_op", ""), given["group_name"], world_in(node))


def is_other_collective(node: fx.Node) -> bool:
    """Whether a node communicates in a form that `as_collective` does not read: coalesced, in place, into an output."""
    target: Any = operator_of(node) if node.op == "call_function" else None
    if getattr(target, "namespace", "") not in ("_c10d_functional", "_c10d_functional_autograd", "c10d_functional"):
        return False
    return target not in KINDS and not any(word in target._schema.name for word in ("wait_tensor", "_wrap_tensor"))


def operator_of(node: fx.Node) -> Any:
    """What a node calls: where AOTAutograd wrapped an operator that writes to its arguments, that operator."""
    return node.args[0] if node.target in FUNCTIONALIZED else node.target


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """The arguments of `operator_of` by name; of one that is wrapped the newer wrapper leaves out its output."""
    return dict(node.kwargs) if node.target in FUNCTIONALIZED else normalized(node)


def group_name(node: fx.Node) -> str:
    """The name of a collective's process group; ``""`` where the graph does not hold it."""
    group = arguments_of(node)["group_name"]
    return group if isinstance(group, str) else ""


def world_in(node: fx.Node) -> int | None:
    """The number of ranks of a collective's group, None where nothing tells it."""
    given = arguments_of(node)
    if "group_size" in given:
        return given["group_size"]
    if "input_split_sizes" in given:
        return len(given["input_split_sizes"])
    if WORLD_KEY in node.meta:
        return node.meta[WORLD_KEY]
    group = given["group_name"]
    if isinstance(group, fx.Node):
        return None
    try:
        return torch_private.get_group_size_by_name(group)
    except (RuntimeError, KeyError, ValueError):  # no process group of that name
        return None
