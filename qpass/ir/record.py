"""The record of a node, which says what was decided about it, and that of a graph, which says its stage.

Decisions are kept in one place, ``node.meta["qpass"]``, so that they move with the node when a pass rewrites
the graph around it. A graph's own record is ``gm.meta["qpass"]``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import fx

from qpass.ir.source import module_stack, source_line
from qpass.ir.text import target_name

Outcome = Literal["quantized", "lowered", "float", "exact"]
Stage = Literal["captured", "prepared", "quantized", "lowered"]
STAGES: tuple[Stage, ...] = ("captured", "prepared", "quantized", "lowered")

FUSED_INTO = "fused into "
NODE_KEY = "qpass"
GRAPH_KEY = "qpass"


@dataclass(frozen=True)
class NodeRecord:
    """The decision about one operation.

    ``outcome`` is "quantized" (its operands carry q/dq pairs), "lowered" (a kernel of the target runs it), "float"
    (left in floating point, ``reason`` says why) or "exact" (moves values without rounding: views, max pooling).
    ``asked``: the configuration wanted it quantized, so leaving it in float is worth an error under ``strict``.
    ``float_bytes`` are those of the model's constants that this operation is the first to read in floating point.
    ``group`` is the name of a collective's process group.
    """

    op: str
    outcome: Outcome
    reason: str = ""
    pattern: str = ""
    kernel: str = ""
    module: str = ""
    line: str = ""
    compute_dtype: torch.dtype | None = None
    size: int = 1
    asked: bool = False
    group: str = ""
    float_bytes: int = 0

    @property
    def is_fused(self) -> bool:
        """Whether this operation is part of another one's island."""
        return self.reason.startswith(FUSED_INTO)

    @property
    def is_missed(self) -> bool:
        """Whether the configuration asked for more than was done."""
        if self.outcome == "float":
            return self.asked
        return self.outcome == "quantized" and bool(self.reason) and not self.is_fused

    def but(self, **changes: Any) -> NodeRecord:
        """The same decision with some fields changed."""
        return replace(self, **changes)


@dataclass
class GraphRecord:
    """The state of a whole graph: its stage, the configuration it was prepared with, and notes worth reporting.

    ``float_bytes`` are those of all constants of the float model, ``weight_bytes`` those of its floating-point ones
    that it does not write to, and ``weight_bytes_kept`` those among them that operations read in floating point.
    ``passes`` are the names of those that ran on it, each once: what they inserted is no operation of the model.
    """

    stage: Stage = "captured"
    config: Any = None
    target: str = ""
    float_bytes: int = 0
    weight_bytes: int = 0
    weight_bytes_kept: int = 0
    notes: list[str] = field(default_factory=list)
    passes: tuple[str, ...] = ()


def record_of(node: fx.Node) -> NodeRecord | None:
    """The decision kept on ``node``, if there is one."""
    found = node.meta.get(NODE_KEY)
    return found if isinstance(found, NodeRecord) else None


def records_of(node: fx.Node) -> tuple[NodeRecord, ...]:
    """All decisions kept on ``node``: one, or those about the operations that it stands for."""
    found = node.meta.get(NODE_KEY, ())
    return (found,) if isinstance(found, NodeRecord) else found


def stands_for_several(node: fx.Node) -> bool:
    """Whether ``node`` does what several operations did, each with a decision of its own or none."""
    return isinstance(node.meta.get(NODE_KEY), tuple)


def set_record(node: fx.Node, record: NodeRecord) -> None:
    """Keep ``record`` on ``node``; the latest decision wins."""
    node.meta[NODE_KEY] = record


def set_records(node: fx.Node, records: Iterable[NodeRecord]) -> None:
    """Keep the decisions about the operations that ``node`` stands for."""
    node.meta[NODE_KEY] = tuple(records)


def graph_record(gm: fx.GraphModule) -> GraphRecord:
    """The record of ``gm``, created at stage "captured" when there is none."""
    found = gm.meta.get(GRAPH_KEY)
    if not isinstance(found, GraphRecord):
        found = gm.meta[GRAPH_KEY] = GraphRecord()
    return found


def describe(node: fx.Node, outcome: str, pattern: str = "", reason: str = "") -> NodeRecord:
    """A record of a decision about ``node``, with its place in the user's model."""
    stack = module_stack(node)
    return NodeRecord(
        op=target_name(node), outcome=outcome, pattern=pattern, reason=reason,  # type: ignore[arg-type]
        module=stack[-1][0] if stack else "", line=source_line(node),
    )  # fmt: skip
