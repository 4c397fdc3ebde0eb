"""The base class by which passes know a module that observes one tensor of a prepared graph."""

from __future__ import annotations

from torch import fx, nn


class Observer(nn.Module):
    """Returns its tensor, as it is or rounded, until `convert` takes it out. It is known by its class, not its name."""


def is_observer(node: fx.Node) -> bool:
    """Whether a node calls an observer of the graph module that owns it."""
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return False
    return isinstance(owner.get_submodule(str(node.target)), Observer)
