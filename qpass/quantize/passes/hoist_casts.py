"""Round to a smaller dtype before values are moved, so that less is written and moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qpass.ir.alias import written_nodes
from qpass.ir.editor import Editor
from qpass.ir.fake import recompute_val
from qpass.ir.graph_pass import Pass, PassResult
from qpass.islands.qdq import cast_of
from qpass.islands.views import MOVES

aten = torch.ops.aten
Wanted = dict[fx.Node, torch.dtype]


@dataclass(frozen=True)
class HoistCasts(Pass):
    """``to(transpose(x), bfloat16)  ->  transpose(to(x, bfloat16))``, up through all that only moves values; exact

    Only where all that is read of ``x`` is read in that one smaller dtype: then the operation that computes ``x`` can
    write it itself, as the int8 kernels do. Three slices of one linear, each cast, become one cast and three slices.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        wanted = _wanted(gm.graph)
        moved = {node for node in wanted if node.target in MOVES and node.args[0] in wanted}
        count = 0
        for node, dtype in reversed(wanted.items()):  # sources before what reads them
            if node in moved:
                recompute_val(node)  # its input is the cast by now
                rounded = node
            elif any(user in wanted for user in node.users):
                readers = list(node.users)
                rounded = edit.call(aten.to.dtype, node, dtype, like=node, before=node.next)
                for reader in readers:
                    reader.replace_input_with(node, rounded)
                count += 1
            else:
                continue
            for cast in [user for user in rounded.users if cast_of(user) is rounded]:
                cast.replace_all_uses_with(rounded)
                gm.graph.erase_node(cast)
        return PassResult(count)


def _wanted(graph: fx.Graph) -> Wanted:
    """The operations whose result is read in one smaller dtype alone, with it, readers before what they read."""
    wanted: Wanted = {}
    changing = written_nodes(graph)
    for node in reversed(graph.nodes):
        val = node.meta.get("val")
        if node.op != "call_function" or not isinstance(val, torch.Tensor) or not val.dtype.is_floating_point:
            continue
        if node in changing:  # a cast further up would round what is there before the write
            continue
        dtypes = {_read_in(user, wanted) for user in node.users}
        dtype = dtypes.pop() if len(dtypes) == 1 else None
        if dtype is not None and dtype.is_floating_point and dtype.itemsize < val.dtype.itemsize:
            wanted[node] = dtype
    return wanted


def _read_in(user: fx.Node, wanted: Wanted) -> torch.dtype | None:
    """The dtype that ``user`` wants its input in, or None where that is the dtype it has."""
    if cast_of(user) is not None:
        return user.args[1]  # type: ignore[return-value]  # of a cast
    return wanted.get(user) if user.target in MOVES else None
