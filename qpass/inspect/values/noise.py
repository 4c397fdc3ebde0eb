"""Noise at each compared node of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from qpass.inspect.values.nodes import NodeView


class NodeNoise(NamedTuple):
    """How far one value is from its reference, in dB.

    ``own`` is the ratio to the noise that it adds to that of its noisiest input: what ``sqnr`` would be with exact
    inputs, if noises were independent; ``inf`` where it adds none.
    """

    node: NodeView
    reference: NodeView
    sqnr: float
    own: float


class NoiseData(Mapping[str, float]):
    """dB by the path of each compared node of ``b``, in the order of the graph.

    Attributes:
        nodes: every compared node.
        regions: of each region of ``b``, by its name, how many operations in it were not compared: it runs as one
            operation, as often as its data say, and only its result is seen.
    """

    def __init__(self, nodes: list[NodeNoise], regions: Mapping[str, int] | None = None) -> None:
        self.nodes = tuple(nodes)
        self.regions = dict(regions or {})
        self._by_path = {found.node.path: found.sqnr for found in nodes}

    def __getitem__(self, path: str) -> float:
        return self._by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self._by_path)

    def worst(self, count: int = 10) -> tuple[NodeNoise, ...]:
        """The nodes of the lowest ratio, lowest first."""
        return tuple(sorted(self.nodes, key=lambda found: (found.sqnr, found.node.index))[:count])

    def costliest(self, count: int = 10) -> tuple[NodeNoise, ...]:
        """The nodes that add the most noise to what they were given, most first: where to spend precision."""
        return tuple(sorted(self.nodes, key=lambda found: (found.own, found.node.index))[:count])
