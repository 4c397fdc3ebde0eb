"""The mark of a module that stands on one tensor of a prepared graph, by which passes know it."""

from __future__ import annotations

from torch import fx, nn


class Observer(nn.Module):
    """Hands its tensor on, as it is or rounded, until `convert` takes it out. Its name says nothing."""


def is_observer(node: fx.Node) -> bool:
    """Whether a node calls an observer of the graph module that owns it."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    return isinstance(owner.get_submodule(str(node.target)), Observer)
