"""Pass, the base of all passes, and PassResult, what a pass returns."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx


@dataclass(frozen=True)
class PassResult:
    """What one run of a pass did to one graph.

    Attributes:
        changed: the number of changes, 0 for none.
        notes: sentences that are worth reporting; the report of the graph shows them.
        refusals: what the pass was to do and did not, each with its place and the reason; shown as well.
        found: values for the caller of the pipeline, which are neither changes nor sentences.
    """

    changed: int = 0
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    found: tuple[Any, ...] = ()

    def __add__(self, other: PassResult) -> PassResult:
        """Both results as one; what is said twice is said once."""
        return PassResult(
            self.changed + other.changed,
            tuple(dict.fromkeys((*self.notes, *other.notes))),
            tuple(dict.fromkeys((*self.refusals, *other.refusals))),
            (*self.found, *other.found),
        )


@dataclass(frozen=True)
class Pass:
    """One kind of change to a graph. Fields are its options. ``run`` changes the graph alone, and says what it did."""

    whole: ClassVar[bool] = False
    """A pass that is whole runs once over a graph. It goes through the regions by itself, and leaves no dead code."""

    @property
    def name(self) -> str:
        """The pass's name: its class in snake case, which is also its file."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def requires(self, gm: fx.GraphModule) -> None:
        """Raise a ``QpassError`` when the pass cannot run on ``gm``."""

    def run(self, gm: fx.GraphModule) -> PassResult | int:
        """Transform one region, in place; a second run changes nothing. A number stands for so many changes."""
        raise NotImplementedError

    def ensures(self, gm: fx.GraphModule) -> None:
        """Raise a ``QpassError`` when the result lacks what the pass promises."""
