"""Targets and their kernels: what a device runs in low precision, for which islands, and what it asks of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import fx

from qpass.ir.editor import Editor
from qpass.ir.rule import Refusal
from qpass.islands.island import Island, IslandMatch, Specs


@dataclass(frozen=True)
class Output:
    """The node that a kernel's result replaces, with the dtype and qparams in which the kernel writes it."""

    node: fx.Node
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    zero_point: int = 0


class Kernel:
    """A kernel of a target: which fusions and operand specs it takes, and how it is put into a graph."""

    name: ClassVar[str]
    fusions: ClassVar[frozenset[tuple[str, ...]]] = frozenset({()})

    def check(self, m: IslandMatch, specs: Specs) -> None:
        """Refuse operand specs or shapes that the kernel does not run."""

    def emit(self, m: IslandMatch, out: Output, edit: Editor) -> fx.Node:
        """Insert the kernel for a matched q/dq form before ``out.node`` and return the node that replaces it."""
        raise NotImplementedError

    def output(self, m: IslandMatch) -> Output:
        """How far the kernel's result reaches: the plain result unless a kernel rounds or casts it by itself.

        May refuse, when the kernel must round its result and no reader asks for that.
        """
        return Output(m.output)

    def note(self, m: IslandMatch) -> str:
        """What the report says of this kernel here besides its name, or ""; asked of a quantized graph."""
        return ""


def _nothing_missing() -> str:
    return ""


def _never() -> bool:
    return False


def _no_dtype() -> None:
    return None


@dataclass(frozen=True, eq=False)
class Target:
    """What a kind of device runs in low precision. Targets compare by identity.

    Attributes:
        name: what ``prepare(..., target=...)`` and reports call it.
        device: the ``torch.device`` type of the parameters that it serves, such as "cpu".
        kernels: the kernels of each island, in order of preference.
        missing: why this machine cannot run the kernels, or "" when it can; asked when a graph is lowered.
        fast_dtype: what ``compute_dtype="auto"`` is on this machine: the dtype that it computes faster than float32 in
            what stays in floating point, or None to leave that as it is.
        expands_attention: whether two matrix products and a softmax beat torch's fused attention on this machine.
        only_behind: islands that pay only where another, quantized one stands before them.
    """

    name: str
    device: str
    kernels: Mapping[type[Island], tuple[Kernel, ...]]
    missing: Callable[[], str] = _nothing_missing
    fast_dtype: Callable[[], torch.dtype | None] = _no_dtype
    expands_attention: Callable[[], bool] = _never
    only_behind: Mapping[type[Island], type[Island]] = field(default_factory=lambda: MappingProxyType({}))

    def with_kernels(self, kernels: Mapping[type[Island], tuple[Kernel, ...]], name: str = "") -> Target:
        """A target that tries ``kernels`` first and knows the islands among them; it needs a ``name`` of its own."""
        joined = {island: (*kernels.get(island, ()), *self.kernels.get(island, ())) for island in self.kernels}
        joined |= {island: tuple(own) for island, own in kernels.items() if island not in joined}
        return replace(self, name=name or self.name, kernels=MappingProxyType(joined))

    def kernel_for(self, m: IslandMatch, specs: Specs, final: bool = False) -> tuple[Kernel, Output]:
        """The first kernel that takes these operand specs; refuses with every kernel's reason.

        ``final``: the graph is quantized, so what a kernel asks of its readers holds or does not, and is checked too.
        """
        reasons = []
        for kernel in self.kernels.get(type(m.island), ()):
            if m.fused not in kernel.fusions:
                continue
            try:
                kernel.check(m, specs)
                return kernel, kernel.output(m) if final else Output(m.output)
            except Refusal as refusal:
                reasons.append(refusal.reason)
        raise Refusal("; ".join(dict.fromkeys(reasons)) or f"{self.name} has no int8 kernel for {m.island.name}")

    def fusions(self, island: Island) -> set[tuple[str, ...]]:
        """All chains of fused operations that some kernel runs behind ``island``."""
        return {fusion for kernel in self.kernels.get(type(island), ()) for fusion in kernel.fusions}

    def islands(self, catalogue: tuple[Island, ...]) -> tuple[Island, ...]:
        """The islands of ``catalogue``, and behind them those that only this target knows."""
        known = {type(island) for island in catalogue}
        return (*catalogue, *(island() for island in self.kernels if island not in known))
