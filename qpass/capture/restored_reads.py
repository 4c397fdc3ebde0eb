"""Reads of a value that a trace in evaluation shows as reads of dropout's result.

Dropout returns its input in evaluation, the very tensor. From torch 2.15 on a trace takes what reads that tensor later
for a reader of the result:

    y = dropout(x); z = fc(y) + x        is traced as        y = dropout(x); z = fc(y) + y

The values are equal in evaluation. In training they are not, and the trace in training says which one is read.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from qpass.capture.branches import replace_reads
from qpass.capture.graph_comparison import match_arguments, steps
from qpass.ir.source import module_path
from qpass.ir.training_modules import DROPOUT


def restore_reads(gm: fx.GraphModule, trains: fx.GraphModule) -> int:
    """``fc(dropout(x)) + dropout(x)  ->  fc(dropout(x)) + x``, where ``trains`` reads x; exact.

    Args:
        gm: a trace in evaluation; edited.
        trains: the trace in training, which may hold more operators.

    Returns the number of reads restored.
    """
    twin: dict[fx.Node, fx.Node] = {}
    theirs = steps(trains.graph, lambda _: False)
    start = count = 0
    for reader in steps(gm.graph, lambda _: False):
        index = next((i for i in range(start, len(theirs)) if _are_alike(reader, theirs[i])), None)
        if index is None:
            continue
        twin[reader], start = theirs[index], index + 1
        sources = _sources(reader, theirs[index], twin)
        if any(sources):
            replace_reads(reader, sources)
            count += sum(source is not None for source in sources)
    return count


def _are_alike(ours: fx.Node, theirs: fx.Node) -> bool:
    if ours.op != theirs.op or (ours.op == "call_function" and ours.target is not theirs.target):
        return False
    return ours.meta.get("stack_trace") == theirs.meta.get("stack_trace") and module_path(ours) == module_path(theirs)


def _sources(reader: fx.Node, other: fx.Node, twin: dict[fx.Node, fx.Node]) -> list[fx.Node | None]:
    """For each node among the arguments of ``reader`` the one in front of dropouts that ``other`` reads, else None."""
    found: list[fx.Node | None] = []

    def note(node: fx.Node, read: Any) -> bool:
        source = node
        while twin.get(source) is not read and source.target in DROPOUT:
            source = source.args[0]  # type: ignore[assignment]
        found.append(source if source is not node and twin.get(source) is read else None)
        return True

    match_arguments((reader.args, reader.kwargs), (other.args, other.kwargs), note)
    return found
