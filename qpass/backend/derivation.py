"""How each constant of a lowered graph is computed from other constants, read from the graph once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qpass.errors import LowerError
from qpass.ir.origins import derived_constants, origins
from qpass.ir.regions import regions

Key = tuple[str, int]
"""A constant: ("argument", position) of a call, ("tensor", number) of one that stays the same, or ("derived", step)."""


@dataclass(frozen=True)
class Step:
    """One derivation: its sources, and the constant that the graph reads, if it reads it."""

    sources: tuple[Key, ...]
    compute: Callable[..., Tensor]
    constant: Tensor | None


class Derivation:
    """The chain from what a call brings, and from tensors that stay the same, to what the compiled code reads.

    ``steps`` are in the order in which they can be computed; ``tensors`` are those that no call brings.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.steps: list[Step] = []
        self.tensors: list[Tensor] = []
        self._keys: dict[tuple[int, str], Key] = {}
        for region in regions(gm):
            for name, derived in derived_constants(region).items():
                sources = tuple(self.key(region, source) for source in derived.sources)
                self._keys[id(region), name] = "derived", len(self.steps)
                self.steps.append(Step(sources, derived.compute, _find(region, name)))

    def key(self, region: fx.GraphModule, name: str) -> Key:
        """What the constant ``name`` of a region of the graph stands for.

        Raises:
            LowerError: it stands for nothing.
        """
        if (id(region), name) not in self._keys:
            origin = origins(region).get(name)
            if isinstance(origin, int):
                return "argument", origin
            tensor = _find(region, name) if origin is None else origin
            if tensor is None:
                raise LowerError(f"a constant is derived from {name}, which the graph does not hold")
            self._keys[id(region), name] = "tensor", self._number(tensor)
        return self._keys[id(region), name]

    def _number(self, tensor: Tensor) -> int:
        for number, known in enumerate(self.tensors):
            if known is tensor:
                return number
        self.tensors.append(tensor)
        return len(self.tensors) - 1


def _find(region: fx.GraphModule, name: str) -> Tensor | None:
    found: Any = region
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None
