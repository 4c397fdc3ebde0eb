"""An operator whose shape function in torch says other dtypes than it returns: put right in graphs that hold it.

Its fake results are float64 and int64, its real ones float32: what is computed from them has the wrong ``val``, and
AOTAutograd, which runs a graph on fake tensors before it decomposes anything, fails at the first operator that checks.
"""

from __future__ import annotations

import operator

from torch import fx

from qpass.arithmetic import graph_ops
from qpass.arithmetic.decompositions import table
from qpass.ir.fake import fake_call, refresh_val
from qpass.ir.regions import regions

MISDESCRIBED = graph_ops.choose_qparams_per_token.default


def correct_vals(gm: fx.GraphModule) -> int:
    """The fake values of the operator's results become what it really returns; how many were corrected."""
    found = _calls(gm)
    for node in found:
        node.meta["val"] = fake_call(*node.args, call=table()[MISDESCRIBED], **node.kwargs)
        for user in node.users:
            if user.target is operator.getitem:
                refresh_val(user)
    return len(found)


def spell_out(gm: fx.GraphModule) -> int:
    """``choose_qparams_per_token(x)  ->  its decomposition(x)``, a call of the function itself; how many there were."""
    found = _calls(gm)
    for node in found:
        node.target = table()[MISDESCRIBED]
    for region in regions(gm) if found else ():
        region.recompile()
    return len(found)


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        node for region in regions(gm) for node in region.graph.find_nodes(op="call_function", target=MISDESCRIBED)
    ]  # fmt: skip
