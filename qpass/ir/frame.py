"""What every pass is."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class Pass:
    """One law over one graph. Fields are its options; ``run`` returns how many changes it made, 0 for none."""

    @property
    def name(self) -> str:
        """The pass's name: its class in snake case, which is also its file."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", type(self).__name__).lower()

    def requires(self, gm: fx.GraphModule) -> None:
        """Raise a ``QpassError`` when the pass cannot run on ``gm``."""

    def run(self, gm: fx.GraphModule) -> int:
        """Transform one region and return the number of changes; a second run returns 0."""
        raise NotImplementedError

    def ensures(self, gm: fx.GraphModule) -> None:
        """Raise a ``QpassError`` when the result lacks what the pass promises."""
