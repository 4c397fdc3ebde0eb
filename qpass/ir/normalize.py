"""The plain form of a captured graph: no in-place writes, no operators that do nothing, nothing unused.

Every step here is exact, bit for bit, runs in time linear in the graph, returns how many nodes it changed, and leaves
the recompilation of the graph modules it edits to the caller. Regions are normalised too. `plain_form` has the passes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Set
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.alias import Memory, aliased_inputs, all_arguments, arguments, storages, written_inputs
from qpass.ir.attributes import get_constant
from qpass.ir.fake import fake_call
from qpass.ir.gradient import DETACH, differentiable
from qpass.ir.regions import regions
from qpass.ir.training_modules import DROPOUT

aten = torch.ops.aten


def functionalize_inplace(gm: fx.GraphModule) -> int:
    """``relu_(x); use(x)  ->  y = relu(x); use(y)``.

    Done for every ATen operator that writes only to its first argument and has a functional twin of the same overload,
    where nobody can tell the difference: the memory was allocated in this graph, no other view of it is read later,
    and the twin's result has the dtype of what was written. All others stay in place.
    """
    return sum(_functionalize(region.graph) for region in regions(gm))


def drop_noops(gm: fx.GraphModule, trains: bool = False) -> int:
    """``dropout(x, p, train=False)  ->  x``, and so for every operator that returns the values of its input.

    Three kinds, each under the condition that makes it exact:

    - the result is the input itself (dropout that is off, a cast to the dtype and device it has): always;
    - the result is the same view of the same memory (``detach``, ``alias``, ``x[:]``): nothing writes to the memory;
    - the result is a copy (``lift_fresh_copy``, ``_to_copy`` to the same dtype): nothing writes to the copy or its
      source, and the copy does not leave the graph.

    Kept: ``contiguous`` and ``clone``, whose layout a later view may need when an input's layout is not the example's;
    a ``detach`` in front of a higher-order operator; what a region returns, since a region may not return an input.
    Where the graph ``trains``, a ``detach`` of what has a gradient is kept too.
    """
    return sum(
        _drop_noops(region.graph, region is not gm, differentiable(region) if trains else frozenset())
        for region in regions(gm)
    )


def eliminate_dead(gm: fx.GraphModule) -> int:
    """Erase the nodes that no result depends on. Returns the number of nodes erased.

    Kept: inputs, writes, assertions, random draws (they advance the generator). Two kinds of check go, although
    nothing ever reads them: constraints on a symbolic size that nothing else reads, and export's assertions that a
    computed value has the dtype it was traced with, which follow from those of the inputs.
    """
    return sum(_eliminate_dead(region) for region in reversed(list(regions(gm))))


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether an operator advances the random generator: dropout does when it is on, attention when it has dropout."""
    tags = node.target.tags if isinstance(node.target, torch_private.OpOverload) else ()
    if torch.Tag.nondeterministic_seeded not in tags:
        return False
    for entry, value in all_arguments(node):
        never = entry.name in ("p", "dropout", "dropout_p") and value == 0
        if never or (entry.name in ("train", "training") and value is False):
            return False
    return True


def is_whole_slice(node: fx.Node) -> bool:
    """Whether the node is ``x[:]`` along some dimension, of whatever size."""
    if node.target is not aten.slice.Tensor:
        return False
    start, end, step = (value for _, value in all_arguments(node)[2:])
    return start in (None, 0) and end in (None, sys.maxsize) and step == 1


# ---- in-place writes


class _Block:
    """Memory that some nodes share: whether this graph allocated it, and its two nodes that are read last."""

    def __init__(self, writable: bool) -> None:
        self.writable = writable
        self.latest: list[tuple[int, fx.Node]] = []
        self._merged_into: _Block | None = None

    def whole(self) -> _Block:
        block = self
        while block._merged_into is not None:
            block = block._merged_into
        return block

    def add(self, node: fx.Node, last_read: int) -> None:
        others = [entry for entry in self.latest if entry[1] is not node]
        self.latest = sorted([*others, (last_read, node)], key=lambda entry: -entry[0])[:2]

    def merge(self, other: _Block) -> None:
        if other is not self:
            self.writable &= other.writable
            for last_read, node in other.latest:
                self.add(node, last_read)
            other._merged_into = self

    def read_after(self, position: int, apart_from: fx.Node) -> bool:
        return any(last_read > position for last_read, node in self.latest if node is not apart_from)


def _functionalize(graph: fx.Graph) -> int:
    nodes = list(graph.nodes)
    if not any(written_inputs(node) for node in nodes):
        return 0
    position = {node: index for index, node in enumerate(nodes)}
    last_read = {node: max((position[user] for user in node.users), default=-1) for node in nodes}
    blocks: dict[fx.Node, _Block] = {}
    of_storage: dict[int, _Block] = {}
    count = 0
    for index, node in enumerate(nodes[:-1]):  # the last node is the output
        twin = _functional_twin(node)
        if twin is not None and _may_replace(node, twin, blocks[node.args[0]].whole(), index):
            value: fx.Node = node.args[0]
            last_read[node] = max(last_read[node], last_read[value])
            for user in [user for user in value.users if position[user] > index]:
                user.replace_input_with(value, node)
            node.target = twin
            count += 1
            if not aliased_inputs(node):  # the result is memory of its own, although the fake values say otherwise
                of_storage.update(dict.fromkeys(storages(node), _Block(writable=True)))
        shared = [blocks[source].whole() for source in aliased_inputs(node)]
        shared += [of_storage[key].whole() for key in storages(node) if key in of_storage]
        block = shared[0] if shared else _Block(writable=node.op == "call_function")
        for other in shared[1:]:
            block.merge(other.whole())
        of_storage.update(dict.fromkeys(storages(node), block))
        blocks[node] = block
        block.add(node, last_read[node])
    return count


def _may_replace(node: fx.Node, twin: torch_private.OpOverload, block: _Block, position: int) -> bool:
    value: fx.Node = node.args[0]  # type: ignore[assignment]
    if twin is aten.detach.default:  # detach_ writes no values
        return True
    return block.writable and not block.read_after(position, apart_from=value) and _keeps_dtype(node, twin)


def _keeps_dtype(node: fx.Node, twin: torch_private.OpOverload) -> bool:
    """Whether the twin's result has the dtype of the value written to; type promotion may widen it."""
    vals = [source.meta.get("val") for source in node.all_input_nodes]
    if len({val.dtype for val in vals if isinstance(val, torch.Tensor)}) == 1:
        return True
    result = fake_call(*node.args, call=twin, **node.kwargs)
    return isinstance(result, torch.Tensor) and result.dtype == node.args[0].meta["val"].dtype  # type: ignore[union-attr]


def _functional_twin(node: fx.Node) -> torch_private.OpOverload | None:
    if node.op != "call_function" or not isinstance(node.target, torch_private.OpOverload):
        return None
    return _twin(node.target) if written_inputs(node) == [node.args[0]] else None


@functools.cache
def _twin(target: torch_private.OpOverload) -> torch_private.OpOverload | None:
    """``aten.relu`` for ``aten.relu_``; None where the pair does not exist or does not mean the same."""
    namespace, _, name = target._schema.name.partition("::")
    if namespace != "aten" or not name.endswith("_") or name.startswith(("_", "resize", "set_", "rename")):
        return None
    if torch.Tag.nondeterministic_seeded in target.tags:
        return None
    twin = getattr(getattr(aten, name[:-1], None), target._overloadname, None)
    if twin is None or twin._schema.is_mutable or len(twin._schema.returns) != 1:
        return None
    same = [(a.name, str(a.type)) for a in target._schema.arguments] == [
        (a.name, str(a.type)) for a in twin._schema.arguments
    ]
    return twin if same else None


# ---- operators that do nothing

_SAME_VIEW = {aten.detach.default, aten.alias.default, aten.lift_fresh.default}


def _drop_noops(graph: fx.Graph, in_region: bool, with_gradient: Set[fx.Node]) -> int:
    count = 0
    memory: Memory | None = None
    output = graph.output_node()
    for node in list(graph.nodes):
        kind = _noop_kind(node)
        if kind is None or (in_region and output in node.users):
            continue
        source: fx.Node = node.args[0]
        memory = memory or Memory(graph)
        if kind == "view" and (memory.is_written(node) or (node.target is DETACH and source in with_gradient)):
            continue
        if kind == "copy" and (memory.is_written(node) or memory.is_written(source) or memory.is_returned(node)):
            continue
        node.replace_all_uses_with(source)
        graph.erase_node(node)
        count += 1
    return count


def _noop_kind(node: fx.Node) -> str | None:
    """How the result relates to the first argument: "itself", "view" or "copy"; None where the operator does work."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch_private.OpOverload) or not node.args:
        return None
    if target in DROPOUT:
        _, p, train = node.args
        return "itself" if p == 0 or not train else None
    if target in _SAME_VIEW:
        before_region = any(isinstance(user.target, torch_private.HigherOrderOperator) for user in node.users)
        return None if before_region else "view"
    if target is aten.slice.Tensor:
        return "view" if is_whole_slice(node) else None
    if target is aten.lift_fresh_copy.default:
        return "copy"
    name = target._schema.name
    if name in ("aten::to", "aten::type_as", "aten::_to_copy") and _keeps_type(node):
        copies = name == "aten::_to_copy" or _argument(node, "copy")
        return "copy" if copies else "itself"
    return None


def _keeps_type(node: fx.Node) -> bool:
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    return (
        isinstance(before, torch.Tensor)
        and isinstance(after, torch.Tensor)
        and (before.dtype, before.device, before.layout) == (after.dtype, after.device, after.layout)
        and _argument(node, "memory_format") in (None, torch.preserve_format)
    )


def _argument(node: fx.Node, name: str) -> Any:
    return next((value for argument, value in arguments(node) if argument.name == name), None)


# ---- dead code

_CONSTRAINTS = {aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default}


def _eliminate_dead(gm: fx.GraphModule) -> int:
    count = 0
    for node in reversed(gm.graph.nodes):
        if not node.users and (_is_pure(gm, node) or _follows_from_inputs(node) or _constrains_nothing(node)):
            gm.graph.erase_node(node)
            count += 1
    return count


def _is_pure(gm: fx.GraphModule, node: fx.Node) -> bool:
    if isinstance(node.target, torch_private.HigherOrderOperator):
        bodies: Iterator[Any] = (get_constant(gm, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr")
        inner = [body for body in bodies if isinstance(body, fx.GraphModule)]
        return all(n.op in ("placeholder", "output") or _is_pure(body, n) for body in inner for n in body.graph.nodes)
    if isinstance(node.target, torch_private.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return not draws_random_numbers(node)
    return not node.is_impure()


def _follows_from_inputs(node: fx.Node) -> bool:
    if node.target is not aten._assert_tensor_metadata.default or node.args[0].op != "call_function":  # type: ignore[union-attr]
        return False
    return _argument(node, "size") is None and _argument(node, "stride") is None


def _constrains_nothing(node: fx.Node) -> bool:
    return node.target in _CONSTRAINTS and all(user.target in _CONSTRAINTS for user in node.args[0].users)  # type: ignore[union-attr]
