"""Put an observer on every edge that ``annotate`` chose."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

from torch import fx

from qpass.ir.alias import written_nodes
from qpass.ir.attributes import free_name
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.guard import behind_checks
from qpass.ir.observer import is_observer
from qpass.islands.views import carried
from qpass.quantize.passes.annotate import EDGES
from qpass.spec import QuantizationSpec
from qpass.spec.fake_quantize import FakeQuantizeBase
from qpass.spec.observers import observer_for

OBSERVER_PREFIX = "activation_post_process_"
"""How the modules are called, followed by a number: as torch.ao calls its own."""


@dataclass(frozen=True)
class InsertObservers(Pass):
    """``linear(x, w)  ->  linear(activation_post_process_0(x), activation_post_process_1(w))``

    One tensor has one observer for each spec, however many read it. Where all readers of a view, a pooling or a
    concatenation are quantized alike, the observer stands in front of it, so that codes can pass through; the inputs
    of a concatenation then share one observer and so their qparams. What is written in place is observed where it is
    read, each time anew.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        changing = written_nodes(gm.graph)
        shared = self._raise_edges(gm, changing)
        edit, constants = Editor(gm, self.name), Constants(gm)
        modules: dict[tuple[fx.Node, QuantizationSpec], str] = {}
        calls: dict[tuple[fx.Node, QuantizationSpec], fx.Node] = {}
        reads: dict[str, set[fx.Node]] = {}
        number = count = 0
        for user in list(gm.graph.nodes):
            for source, spec in user.meta.pop(EDGES, {}).items():
                call = calls.get((source, spec))
                if call is None:
                    key = (shared.find(source), spec)
                    if key not in modules:
                        modules[key] = free_name(gm, f"{OBSERVER_PREFIX}{number}")
                        number = int(modules[key].removeprefix(OBSERVER_PREFIX).partition("_")[0]) + 1
                        gm.add_module(modules[key], observer_for(spec))
                    following = user if source in changing else source.next
                    call = self._insert(edit, modules[key], source, user, source in constants, following)
                    count += 1
                    reads.setdefault(modules[key], set()).add(source)
                    if source not in changing:
                        calls[source, spec] = call
                user.replace_input_with(source, call)
        for name, sources in reads.items():
            if len(sources) == 1 and all(source in constants and source not in changing for source in sources):
                module: Any = gm.get_submodule(name)
                module.watches_constant = True
        return PassResult(count)

    def _insert(
        self, edit: Editor, name: str, source: fx.Node, user: fx.Node, constant: bool, following: fx.Node
    ) -> fx.Node:
        # not before it is known that the graph holds for an input, and not among the inputs
        if "placeholder" in (source.op, following.op) and following is not user:
            following = behind_checks(source.graph)
        origin = user if constant or source.op == "placeholder" else source  # an input has no line of its own
        call = edit.module(name, source, like=origin, before=following)
        call.meta["val"] = source.meta.get("val")
        return call

    def _raise_edges(self, gm: fx.GraphModule, changing: Set[fx.Node]) -> _Shared:
        """Move edges up through operations that only move values, where every reader wants the same static spec.

        Whatever an edge is moved to must have the qparams of what it was moved from: those tensors share an observer.
        """
        shared = _Shared()
        for node in reversed(gm.graph.nodes):
            inputs = carried(node)
            if not inputs or not node.users:
                continue
            specs = {user.meta.get(EDGES, {}).get(node) for user in node.users}
            spec = next(iter(specs))
            if len(specs) != 1 or spec is None or node in changing or not _may_pass(node, spec):
                continue
            for user in node.users:
                del user.meta[EDGES][node]
            for source in inputs:
                node.meta.setdefault(EDGES, {})[source] = spec
                shared.join(source, node)
        return shared


def _may_pass(node: fx.Node, spec: QuantizationSpec) -> bool:
    from qpass.spec import PerTensor

    return isinstance(spec.granularity, PerTensor) and not spec.dynamic and "val" in node.meta


class _Shared:
    """Tensors in sets that share one observer."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def find(self, node: fx.Node) -> fx.Node:
        """The tensor that stands for the set of ``node``."""
        while node in self._parent:
            node = self._parent[node]
        return node

    def join(self, a: fx.Node, b: fx.Node) -> None:
        """Put the sets of both together."""
        a, b = self.find(a), self.find(b)
        if a is not b:
            self._parent[a] = b


def observers(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, str]]:
    """The observer calls of one region with their module names."""
    for node in gm.graph.nodes:
        if is_observer(node):
            yield node, str(node.target)


def is_trained(observer: Any) -> bool:
    """Whether an observer rounds in training, and so has qparams that the model was trained with."""
    return isinstance(observer, FakeQuantizeBase) and observer.has_data
