"""Give values the strides of the float model where something can see them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qpass import torch_private
from qpass.ir.alias import aliased_inputs, written_inputs, written_nodes
from qpass.ir.editor import Editor
from qpass.ir.fake import fake_result
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.strides import LAID_OUT, same_strides

aten = torch.ops.aten

BLIND = frozenset({"aten", "prims", "onednn", "quantized_decomposed", "qpass_decomposed"})
"""Namespaces of operators whose results hold the same values whatever the strides of their inputs."""
SEEING = frozenset({
    aten.as_strided.default, aten.as_strided_.default, aten.as_strided_copy.default, aten.as_strided_scatter.default,
    aten.view.dtype, aten.view_as_real.default, aten.view_as_complex.default, aten.stride.int, aten.sym_stride.int,
    aten.stride.default, aten.sym_stride.default, aten.is_contiguous.default, aten.is_contiguous.memory_format,
    aten.sym_is_contiguous.default, aten.is_non_overlapping_and_dense.default, aten.is_strides_like_format.default,
    aten._assert_tensor_metadata.default,
})  # fmt: skip
"""The operators among them that do see strides."""


@dataclass(frozen=True)
class KeepStrides(Pass):
    """``as_strided(conv(x))  ->  as_strided(clone(conv(x)))``: strides are the float model's where they are seen

    They are seen by what leaves the graph, by ``as_strided`` and its like, by operators of others, and by a ``view``
    that another layout does not allow. Everything else reads a kernel's result as the kernel laid it out, so a
    channels-last image flows from convolution to convolution. What is written in place is laid out where it is made:
    whether a ``reshape`` shares its memory depends on its strides.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        if not any(LAID_OUT in node.meta for node in gm.graph.nodes):
            return PassResult(0)
        return PassResult(_Restoring(gm, self.name).count)


class _Restoring:
    """One walk over a graph that knows, of each node, what it really returns where that is not its ``val``."""

    def __init__(self, gm: fx.GraphModule, name: str) -> None:
        self.edit, self.count = Editor(gm, name), 0
        self.real: dict[fx.Node, Any] = {}
        self.restored: dict[fx.Node, fx.Node] = {}
        by_the_model = any(written_inputs(n) and n.target.namespace != "onednn" for n in gm.graph.nodes)
        self.written = written_nodes(gm.graph) if by_the_model else frozenset()
        for node in list(gm.graph.nodes):
            self._visit(node)
        for node, real in self.real.items():  # nothing sees these strides, so the node says what it has
            node.meta["val"] = real
            node.meta.pop(LAID_OUT, None)

    def _visit(self, node: fx.Node) -> None:
        other = [source for source in node.all_input_nodes if source in self.real]
        if LAID_OUT in node.meta:
            self.real[node] = node.meta[LAID_OUT]
        elif other:
            if _sees_strides(node):
                self._restore_inputs(node, other)
            else:
                self._pass_on(node, other)
        if node in self.real and node in self.written:
            self._restore_everywhere(node)

    def _pass_on(self, node: fx.Node, other: list[fx.Node]) -> None:
        """Learn what an operation makes of its inputs as they are, or restore them if it cannot run on them."""
        try:
            real = fake_result(node.target, node.args, node.kwargs, self.real)  # type: ignore[arg-type]
        except (RuntimeError, ValueError):  # a view that these strides do not allow
            self._restore_inputs(node, other)
            return
        if not same_strides(real, node.meta.get("val")):
            self.real[node] = real

    def _restore_inputs(self, node: fx.Node, other: Iterable[fx.Node]) -> None:
        for source in other:
            node.replace_input_with(source, self._restore(source))

    def _restore(self, node: fx.Node) -> fx.Node:
        """``node`` in the strides of its ``val``: a copy of what was computed, behind which views are views again."""
        if node not in self.restored:
            bases = [source for source in aliased_inputs(node) if source in self.real]
            if _is_cast(node):
                found = self._copy(node) if node.args[0] in self.written else self._cast(node.args[0], node.args[1])
            elif bases:
                found = self._again(node, {source: self._restore(source) for source in bases})
            else:
                found = self._copy(node)
            self.restored[node] = found
            self.count += 1
        return self.restored[node]

    def _cast(self, node: Any, dtype: Any) -> fx.Node:
        """``to(view(x)) -> view(to(x))``: the cast of a part packs it, the part of a cast lies as it did."""
        bases = aliased_inputs(node) if not _is_cast(node) else []
        if not bases:
            base = self._restore(node) if node in self.real else node
            return self.edit.call(aten.to.dtype, base, dtype, like=node, after=_behind(base))
        return self._again(node, {source: self._cast(source, dtype) for source in bases})

    def _again(self, node: fx.Node, instead: dict[fx.Node, fx.Node]) -> fx.Node:
        """A view once more, of other values."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: instead.get(n, n))
        last = max(node, *instead.values())
        return self.edit.call(node.target, *args, like=node, after=last, **kwargs)  # type: ignore[arg-type]

    def _restore_everywhere(self, node: fx.Node) -> None:
        found = self._restore(node)
        node.replace_all_uses_with(found, lambda user: user is not found and user not in self._made(node))
        node.meta["val"] = self.real.pop(node)
        node.meta.pop(LAID_OUT, None)

    def _copy(self, node: fx.Node) -> fx.Node:
        """A copy with the strides of ``val``: a permutation of dimensions, since kernels leave no gaps."""
        val = node.meta["val"]
        order = _outermost_first(val)
        place: dict[str, Any] = {"like": node}
        if order == list(range(val.dim())):
            return self.edit.call(
                aten.clone.default, node, memory_format=torch.contiguous_format, after=node, val=val, **place
            )
        last = self.edit.call(aten.permute.default, node, order, after=node, **place)
        last = self.edit.call(aten.clone.default, last, memory_format=torch.contiguous_format, after=last, **place)
        back = [order.index(dim) for dim in range(val.dim())]
        return self.edit.call(aten.permute.default, last, back, after=last, val=val, **place)

    def _made(self, node: fx.Node) -> set[fx.Node]:
        """The first node of the copy, which goes on reading ``node``."""
        made, found = set(), self.restored[node]
        while found is not node and found.all_input_nodes:
            made.add(found)
            found = found.all_input_nodes[0]
        return made


def _sees_strides(node: fx.Node) -> bool:
    if node.op != "call_function":
        return True  # the output; a call of a module, which may hold anything
    target = node.target
    if not isinstance(target, torch_private.OpOverload):
        return getattr(target, "__module__", "") != "_operator"  # control flow, functions; a getitem sees nothing
    return _draws(node, target) or target.namespace not in BLIND or target in SEEING


def _draws(node: fx.Node, target: Any) -> bool:
    """Whether an operation draws random numbers, which it does in the order of memory; an attention, which is tagged
    so for its dropout, draws none without."""
    if target is aten.scaled_dot_product_attention.default:
        dropout = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(dropout != 0.0)
    return torch.Tag.nondeterministic_seeded in target.tags


def _behind(node: fx.Node) -> fx.Node:
    """The node behind which a reader of ``node`` may stand: inputs come first."""
    while node.next.op == "placeholder":
        node = node.next
    return node


def _is_cast(node: fx.Node) -> bool:
    """Whether a node changes the dtype of a value, and so shares no memory with it."""
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return False
    source: Any = node.args[0]
    return bool(source.meta["val"].dtype != node.args[1])


def _outermost_first(val: Tensor) -> list[int]:
    """The dimensions by falling stride; among equal ones, those of one element last, as in a contiguous tensor."""
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # imports sympy

    strides, sizes = (list(map(optimization_hint, numbers)) for numbers in (val.stride(), val.shape))
    return sorted(range(val.dim()), key=lambda dim: (-strides[dim], sizes[dim] == 1, dim))
