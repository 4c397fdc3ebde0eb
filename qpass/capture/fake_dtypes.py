"""The dtypes of an operator's fake results, corrected: its shape function in torch states the wrong ones.

Its fake results are float64 and int64, and its real ones float32. So the ``val`` of what is computed from them is
wrong. AOTAutograd runs a graph on fake tensors before it decomposes anything, and fails at the first operator that
checks a dtype.
"""

from __future__ import annotations

import operator

from torch import fx

from qpass.arithmetic import graph_ops
from qpass.arithmetic.decompositions import table
from qpass.ir.fake import fake_call, recompute_val
from qpass.ir.regions import regions

WITH_WRONG_DTYPES = graph_ops.choose_qparams_per_token.default


def correct_vals(gm: fx.GraphModule) -> int:
    """Give the operator's results the dtypes that it really returns. Returns how many calls were corrected."""
    found = _calls(gm)
    for node in found:
        node.meta["val"] = fake_call(*node.args, call=table()[WITH_WRONG_DTYPES], **node.kwargs)
        for user in node.users:
            if user.target is operator.getitem:
                recompute_val(user)
    return len(found)


def decompose_calls(gm: fx.GraphModule) -> int:
    """``choose_qparams_per_token(x)  ->  its decomposition(x)``, as a call of the function; how many there were."""
    found = _calls(gm)
    for node in found:
        node.target = table()[WITH_WRONG_DTYPES]
    for region in regions(gm) if found else ():
        region.recompile()
    return len(found)


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [
        node for region in regions(gm) for node in region.graph.find_nodes(op="call_function", target=WITH_WRONG_DTYPES)
    ]  # fmt: skip
