"""Where gradients flow in a graph, and where the model stops them."""

from __future__ import annotations

import torch
from torch import fx, nn

from qpass import torch_private
from qpass.ir.attributes import get_constant

DETACH = torch.ops.aten.detach.default


def differentiable(gm: fx.GraphModule) -> set[fx.Node]:
    """The nodes of ``gm`` that a gradient may reach: floating inputs, parameters, and what is computed from them.

    A frozen parameter counts, since training may thaw it.
    """
    found: set[fx.Node] = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            reached = isinstance(get_constant(gm, str(node.target)), nn.Parameter)
        elif node.op == "placeholder":
            reached = is_floating(node)
        else:
            reached = node.target is not DETACH and any(source in found for source in node.all_input_nodes)
        if reached:
            found.add(node)
    return found


def stopped(graph: fx.Graph) -> list[fx.Node]:
    """The calls of ``detach`` that stop a gradient; one in front of a region belongs to the region."""
    return [
        node for node in graph.find_nodes(op="call_function", target=DETACH)
        if not any(isinstance(user.target, torch_private.HigherOrderOperator) for user in node.users)
    ]  # fmt: skip


def is_floating(node: fx.Node) -> bool:
    """Whether a node holds one tensor that may carry a gradient."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and (val.is_floating_point() or val.is_complex())
