"""Take dropout, other random branches and ``detach`` out of a graph while it is decided what to quantize.

Where they were is remembered.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpass.ir.alias import written_nodes
from qpass.ir.gradient import stopped
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.training_modules import BY_MODE, DROPOUT, TrainingChange

ASIDE = "qpass_aside"
"""``gm.meta`` key: the `Aside` of each node taken out, in the order in which they draw random numbers."""


@dataclass(frozen=True)
class Aside:
    """What was taken out: its own node, what it read, who read it, the node behind it, and the mode of what is random.

    A `Branch` may read ``others`` beside the value that it changes.
    """

    node: fx.Node
    source: fx.Node
    others: tuple[fx.Node, ...]
    users: tuple[fx.Node, ...]
    following: fx.Node
    mode: TrainingChange | None


@dataclass(frozen=True)
class SetDropoutAside(Pass):
    """``add(dropout(linear(x, w)), y)  ->  add(linear(x, w), y)``, as evaluation runs it

    So what is fused and quantized in training is what is fused and quantized later. `InsertModes` puts it back. A
    dropout stays where a reader of its result reads its source too, since the two could not be told apart again; a
    `Branch` also where nothing else reads what it computes with. A ``detach`` is treated alike.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        aside: list[Aside] = []
        kept = written_nodes(gm.graph)
        stops = {node for node in stopped(gm.graph) if node not in kept}
        for node in reversed(gm.graph.nodes):
            mode = node.meta.get(BY_MODE)
            if node not in stops and (mode is None or not (node.target in DROPOUT or node.op == "call_module")):
                continue
            source, *others = node.all_input_nodes
            users = tuple(node.users)
            if not users or any(source in user.all_input_nodes for user in users):
                continue
            if any(len(other.users) == 1 and other.op == "call_function" for other in others):
                continue
            aside.append(Aside(node, source, tuple(others), users, node.next, mode))
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
        if aside:
            gm.meta[ASIDE] = aside[::-1]
        return PassResult(len(aside))
