"""Weights that stay in floating point: which operation reads each, and how many bytes that is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qpass import torch_private
from qpass.ir.alias import storages, written_inputs, written_nodes
from qpass.ir.attributes import get_constant
from qpass.ir.constants import Constants
from qpass.islands.qdq import DEQUANTIZE, QUANTIZE
from qpass.islands.views import JOINS, MONOTONE, carried

aten = torch.ops.aten

_REPEATS = {
    aten.repeat.default, aten.tile.default, aten.expand_as.default, aten.repeat_interleave.self_int, aten.flip.default,
    aten.roll.default,
}  # fmt: skip


@dataclass(frozen=True)
class Read:
    """The operation ``reader`` reads the constant ``name`` through ``source``: the constant, a view of it, a value."""

    name: str
    constant: fx.Node
    source: fx.Node
    reader: fx.Node

    @property
    def size(self) -> int | None:
        """Bytes of the part that is read, where it is a view of a size known here; None where all of it is."""
        val = self.source.meta.get("val")
        if not isinstance(val, Tensor) or not set(storages(self.source)) & set(storages(self.constant)):
            return None
        sizes = [size for size, stride in zip(val.shape, val.stride(), strict=True) if stride != 0]
        if not all(isinstance(size, int) for size in sizes):
            return None
        return torch.Size(sizes).numel() * val.element_size()


def reads(gm: fx.GraphModule, constants: Constants) -> Iterator[Read]:
    """Each read of a floating-point constant by the first operation that is none itself, or by the graph's output.

    Views, casts and whatever else moves or repeats the values of one tensor is looked through, sizes that are known
    only at run time included. q/dq operators read no weight. A buffer that the graph writes to is none; a parameter is.
    """
    changing = written_nodes(gm.graph)
    for constant in gm.graph.find_nodes(op="get_attr"):
        value = get_constant(gm, str(constant.target))
        if not _is_weight(value, constant in changing):
            continue
        pending, seen = [constant], {constant}
        while pending:
            source = pending.pop()
            for user in source.users:
                if user.op == "call_function" and (user in constants or _moves(user, source)):
                    if user not in seen and source not in written_inputs(user):
                        seen.add(user)
                        pending.append(user)
                elif _reads(user, source):
                    yield Read(str(constant.target), constant, source, user)


def is_stored(node: object, constants: Constants) -> bool:
    """Whether a value is made of constants and sizes alone: a stored tensor, moved or repeated."""
    while isinstance(node, fx.Node) and node not in constants:
        if node.op == "get_attr":
            return True  # one that the graph writes to
        if not node.args or not _moves(node, node.args[0]):
            return False
        node = node.args[0]
    return isinstance(node, fx.Node)


@dataclass
class FloatWeights:
    """The bytes of a model's floating-point constants, over all of its regions; each constant counts once.

    ``total`` is what there is, ``kept`` what operations read in floating point.
    """

    total: int = 0
    kept: int = 0
    _left: dict[object, int] = field(default_factory=dict)

    def count(self, gm: fx.GraphModule) -> None:
        """Take the constants of a region into the total."""
        changing = written_nodes(gm.graph)
        for constant in gm.graph.find_nodes(op="get_attr"):
            value = get_constant(gm, str(constant.target))
            if _is_weight(value, constant in changing) and _place(value) not in self._left:
                self.total += self._remaining(value)

    def take(self, gm: fx.GraphModule, read: Read) -> int:
        """The bytes that ``read`` keeps in float and no earlier read did."""
        value = get_constant(gm, read.name)
        remaining = self._remaining(value)
        taken = remaining if read.size is None else min(read.size, remaining)
        self._left[_place(value)] = remaining - taken
        self.kept += taken
        return taken

    def _remaining(self, value: Tensor) -> int:
        return self._left.setdefault(_place(value), value.numel() * value.element_size())


def is_matrix(gm: fx.GraphModule, read: Read) -> bool:
    """Whether a parameter of two dimensions or more is read, as products and tables have; a scale or bias has one."""
    value = get_constant(gm, read.name)
    return isinstance(value, torch.nn.Parameter) and value.dim() > 1


def works_by_element(node: fx.Node) -> bool:
    """Whether an operator adds, scales or compares element by element: what it reads is no weight of a product."""
    return isinstance(node.target, torch_private.OpOverload) and torch.Tag.pointwise in node.target.tags


def _is_weight(value: object, is_written: bool) -> bool:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return False
    return isinstance(value, torch.nn.Parameter) or not is_written


def _reads(user: fx.Node, source: fx.Node) -> bool:
    if user.op == "output":
        return True
    if user.op != "call_function" or user.target in QUANTIZE | DEQUANTIZE:
        return False
    return source not in written_inputs(user)


def _moves(user: fx.Node, source: object) -> bool:
    """Whether ``user`` passes on the values of ``source`` and of nothing else."""
    if user.op != "call_function":
        return False
    if user.target in _REPEATS:
        return user.args[0] is source
    return user.target not in MONOTONE | JOINS and carried(user) == (source,)


def _place(value: Tensor) -> object:
    plain = value.layout == torch.strided and value.device.type != "meta"
    return value.data_ptr() if plain and value.data_ptr() else f"object {id(value)}"
