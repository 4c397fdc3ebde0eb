"""The nodes of a graph at one moment, as plain values. They outlive the passes, hold no weight and compare."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

from qpass.ir.record import NodeRecord
from qpass.ir.source import user_line

INPUT = type("Input", (), {"__repr__": lambda _: "_"})()
"""What stands for a node in the arguments of another."""


class Keyword(NamedTuple):
    """A keyword argument in a template."""

    name: str
    value: Any


class Origin(NamedTuple):
    """A node that another was made from: its name and target in the graph of this id."""

    name: str
    target: str
    graph: int


class NodeView:
    """One node as it was. Two views are equal when region, name, kind and operator are.

    Attributes:
        index: its place in ``Snapshot.nodes``.
        region: dotted name of the sub-graph that holds it, ``""`` for the graph itself.
        operator: ``"aten.linear.default"``; the class of a called module; the dotted name of a constant.
        template: its arguments, nested and hashable, with ``INPUT`` for each node that it reads.
        inputs: indices of the nodes that it reads, in order of appearance, with repetitions.
        module: path of the user's module around it.
        made_by: the pass that put it in, as far as recorded.
        val: its fake value, ``place``: (identity, bytes) of a constant's memory.
    """

    __slots__ = (
        "index", "inputs", "is_transparent", "made_by", "module", "name", "op", "operator", "origin", "place", "record",
        "region", "short", "stack", "target", "template", "val",
    )  # fmt: skip

    index: int
    region: str
    name: str
    op: str
    target: Any
    operator: str
    short: str
    template: Any
    inputs: tuple[int, ...]
    module: str
    made_by: str
    val: Any
    stack: str
    record: NodeRecord | None
    origin: Any
    place: tuple[Any, int] | None
    is_transparent: bool

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NodeView) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __repr__(self) -> str:
        return self.path

    @property
    def _identity(self) -> tuple[str, str, str, str]:
        return self.region, self.name, self.op, self.operator

    @property
    def path(self) -> str:
        """``region/name``; the name alone outside regions."""
        return f"{self.region}/{self.name}" if self.region else self.name

    @property
    def line(self) -> str:
        """``"file.py:12: code"`` of the user's line, as far as known."""
        return user_line(self.stack)

    @property
    def form(self) -> str:
        """``"float32[s0, 16]"``, or ``""`` where the node has no tensor value."""
        return form(self.val)

    def origins(self) -> tuple[Origin, ...]:
        """The nodes that it was made from, nearest first, as the passes recorded them."""
        found, origin = [], self.origin
        while origin:
            info = origin[-1].node_info
            if info is not None:
                found.append(Origin(info.name, info.target, info.graph_id))
            origin = origin[-1].from_node
        return tuple(found)


class Snapshot:
    """All nodes of a program at one moment, regions included, in the order in which they run."""

    def __init__(self, nodes: list[NodeView], stage: str, graph_ids: frozenset[int], label: str = "") -> None:
        self.nodes = nodes
        self.stage = stage
        self.graph_ids = graph_ids
        self.label = label

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def users(self) -> list[list[tuple[int, int]]]:
        """For each node, the (index, position among its inputs) of those that read it."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.nodes]
        for view in self.nodes:
            for position, source in enumerate(view.inputs):
                found[source].append((view.index, position))
        return found

    @cached_property
    def sources(self) -> list[int]:
        """For each node, itself, or what an observer, a quantize or a dequantize node carries."""
        found = list(range(len(self.nodes)))
        for view in self.nodes:
            if view.is_transparent and view.inputs:
                found[view.index] = found[view.inputs[0]]
        return found

    @property
    def constant_bytes(self) -> int:
        """Bytes of the constants that the program reads; memory that several share counts once."""
        sizes: dict[Any, int] = {}
        for view in self.nodes:
            if view.place is not None:
                key, size = view.place
                sizes[key] = max(size, sizes.get(key, 0))
        return sum(sizes.values())

    @property
    def sent_bytes(self) -> int:
        """Bytes that one rank gives to collectives in one call, where sizes are known."""
        reads = (self.nodes[view.inputs[0]].val for view in self.nodes if _is_collective(view))
        return sum(_bytes(val) for val in reads) + sum(map(_sent_in_pieces, self.nodes))


def form(val: Any) -> str:
    """``"float32[s0, 16]"`` of a tensor, several of them joined by a comma; ``""`` of anything else."""
    if isinstance(val, Tensor):
        return f"{str(val.dtype).removeprefix('torch.')}[{', '.join(map(str, val.shape))}]"
    if isinstance(val, (tuple, list)):
        return ", ".join(filter(None, map(form, val)))
    return ""


def sizes(val: Any) -> Any:
    """The shape of a value, those of several in a list; None where it is unknown."""
    if isinstance(val, (tuple, list)):
        return [sizes(item) for item in val]
    return str(tuple(val.shape)) if isinstance(val, Tensor) else None


def _is_collective(view: NodeView) -> bool:
    return view.operator.startswith("_c10d_functional.") and ".wait_tensor" not in view.operator and bool(view.inputs)


def _sent_in_pieces(view: NodeView) -> int:
    """Bytes of the payload that `qpass.comm.graph.pieces` makes itself: read off what it receives."""
    if not view.operator.startswith("qpass.send_pieces"):
        return 0
    _, _, parts, _, world, *_ = view.template
    return _bytes(view.val) * parts // world


def _bytes(val: Any) -> int:
    if isinstance(val, (tuple, list)):
        return sum(map(_bytes, val))
    if not isinstance(val, Tensor) or not all(isinstance(size, int) for size in val.shape):
        return 0
    return val.numel() * val.element_size()
