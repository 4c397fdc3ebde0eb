"""Scales that are equal on all ranks of a group, because every rank computed them from the same collective.

largest = wait(all_reduce(amax(x), "max", group))        the same number everywhere
scale = largest / 127                                     and so is this
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx

from qpass.comm.graph.collective import WAIT, as_collective
from qpass.islands.qdq import QdqNode

SHARED_KEY = "qpass_shared"
"""``meta`` key on a quantize or dequantize node: a pass made sure that all ranks have its scale and zero point."""


Origin = Literal["shared", "constant", "own"]


def are_shared(pair: QdqNode, group: Any) -> bool:
    """Whether all ranks of ``group`` have the qparams of a quantize or dequantize node, as far as the graph can tell.

    A number in the graph proves nothing, since each rank may have calibrated its own; only a zero point beside a
    scale that is computed is a constant of the program.
    """
    if pair.node.meta.get(SHARED_KEY):
        return True
    known: dict[fx.Node, Origin] = {}
    scale, zero_point = (_origin(value, group, known) for value in (pair.qparams.scale, pair.qparams.zero_point))
    return scale == "shared" and zero_point != "own"


def _origin(value: Any, group: Any, known: dict[fx.Node, Origin]) -> Origin:
    """Whether all ranks got a value from a collective, the program states it, or each rank may have its own."""
    if not isinstance(value, fx.Node):
        return "constant"
    if value not in known:
        known[value] = "own"
        found = as_collective(value.args[0]) if value.target is WAIT else None
        if found is not None and found.kind in ("all_gather", "all_reduce", "broadcast") and found.group == group:
            known[value] = "shared"
        elif found is None and value.op == "call_function" and not _is_random(value):
            read = value.args[1:2] if value.target is torch.ops.aten.copy.default else value.all_input_nodes
            sources = {_origin(source, group, known) for source in read}
            known[value] = "own" if "own" in sources else "shared" if "shared" in sources else "constant"
    return known[value]


def _is_random(node: fx.Node) -> bool:
    """Whether a node's values are drawn, or whatever lay in memory."""
    name = getattr(node.target, "__name__", "")
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) or "empty" in name
