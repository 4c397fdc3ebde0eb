"""A wait for several transfers, as torch 2.15 writes it, as a wait for each: the only form that the passes read.

a, b = wait_tensors([x, y])        ->        a = wait_tensor(x), b = wait_tensor(y)
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from qpass.comm.graph.collective import WAIT, ops
from qpass.ir.editor import Editor

WAIT_FOR_ALL: Any = ops.wait_tensors.default if hasattr(ops, "wait_tensors") else None
"""The operator that waits for a list; None where this torch has none."""


def wait_for_each(gm: fx.GraphModule) -> int:
    """``wait_tensors([x, y])[0]  ->  wait_tensor(x)``, in place and exact; returns the number of lists."""
    edit = Editor(gm, "wait_for_each")
    calls = gm.graph.find_nodes(op="call_function", target=WAIT_FOR_ALL) if WAIT_FOR_ALL is not None else []
    found = [call for call in calls if all(user.target is operator.getitem for user in call.users)]
    for call in found:
        transfers: Any = call.args[0]
        waits = [edit.call(WAIT, transfer, like=call, before=call) for transfer in transfers]
        item: Any
        for item in list(call.users):
            item.replace_all_uses_with(waits[item.args[1]])
            gm.graph.erase_node(item)
        gm.graph.erase_node(call)
    return len(found)
