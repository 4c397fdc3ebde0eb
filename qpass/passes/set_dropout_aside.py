"""Take dropout out of a graph while it is decided what to quantize, and remember where it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpass.modes import BY_MODE, DROPOUT, Mode
from qpass.passes.frame import Pass
from qpass.rewrite.match import normalized

ASIDE = "qpass_aside"
"""``gm.meta`` key: the `Aside` of each dropout taken out, in the order in which they draw random numbers."""


@dataclass(frozen=True)
class Aside:
    """A dropout that was taken out: what it read, who read it, the node behind it, and its own node."""

    node: fx.Node
    source: fx.Node
    users: tuple[fx.Node, ...]
    following: fx.Node
    mode: Mode


@dataclass(frozen=True)
class SetDropoutAside(Pass):
    """``add(dropout(linear(x, w)), y)  ->  add(linear(x, w), y)``, as evaluation runs it

    So what is fused and quantized in training is what is fused and quantized later. `InsertModes` puts it back. A
    dropout stays where a reader of its result reads its source too, since the two could not be told apart again.
    """

    def run(self, gm: fx.GraphModule) -> int:
        aside: list[Aside] = []
        for node in reversed(gm.graph.nodes):
            mode = node.meta.get(BY_MODE)
            if mode is None or node.target not in DROPOUT:
                continue
            source: fx.Node = normalized(node)["input"]
            users = tuple(node.users)
            if not users or any(source in user.all_input_nodes for user in users):
                continue
            aside.append(Aside(node, source, users, node.next, mode))
            node.replace_all_uses_with(source)
            gm.graph.erase_node(node)
        if aside:
            gm.meta[ASIDE] = aside[::-1]
        return len(aside)
