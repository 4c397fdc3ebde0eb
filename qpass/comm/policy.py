"""Policy: which collectives of a graph are sent compressed, and as what.

Policy("int8")                                      every kind but all_to_all, from 64 KiB on
Policy("int4:32:bf16:hadamard", kinds=("all_gather",), min_bytes=0)
Policy("int8", link=calibrate_link(group))          what pays by the cost model
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qpass.comm.codec import Codec, codec
from qpass.comm.cost import FORMS, Decision, Link, decide
from qpass.errors import ConfigError, InputError, near

MIN_BYTES = 1 << 16
"""Bytes of the whole tensor from which a collective is compressed where no link was measured: below, latency rules."""

LARGE = 1 << 40
"""Elements that a tensor of unknown size is taken to have: more than any break-even."""

EVERYWHERE_EQUAL = ("all_reduce", "reduce_scatter", "all_gather", "broadcast")
"""Kinds whose tensors have one size on all ranks: torch itself demands it."""

_SLOW = Link(bandwidth=1.0, latency=0.0, encode=1e30, decode=1e30)  # on it everything pays that sends fewer bytes


@dataclass(frozen=True)
class Policy:
    """A choice that depends on nothing that could differ by rank; frozen and hashable.

    Args:
        codec: what is sent, by name or as a `Codec`. Stochastic rounding is not for graphs: they hold one seed for
            every call.
        kinds: the collectives that are compressed.
        min_bytes: size of the whole tensor (of an all_gather's output, else of its input) from which on it is. What an
            all_to_all sends may differ by rank, so its size decides nothing: it is compressed wherever it is named.
        link: constants of the groups, from `calibrate_link`, equal on all ranks; then the cost model decides, too.
            A size that is not known when a graph is compiled, or differs by rank, is taken for a large one.

    Raises:
        ConfigError: no such codec or kind, or a stochastic codec.
    """

    codec: Codec
    kinds: tuple[str, ...] = EVERYWHERE_EQUAL
    min_bytes: int = MIN_BYTES
    link: Link | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", codec(self.codec))
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        for kind in self.kinds:
            if kind not in FORMS:
                raise ConfigError(f"No collective is named {kind!r}{near(kind, FORMS)}.")
        if self.codec.stochastic:
            what = f"A graph has one seed for all its calls, and {self.codec} needs a new one each."
            raise ConfigError(what, hint="use a codec that rounds to nearest, or the calls of qpass.comm")

    def decide(self, kind: str, numel: int | torch.SymInt | None, dtype: torch.dtype, world: int) -> Decision:
        """Whether a collective of ``numel`` elements in the whole tensor is compressed, and why.

        A symbolic size is asked what `min_bytes` and the codec ask of any other, and so guards the graph: at another
        answer it is compiled anew, and ranks agree whatever sizes each has compiled for. ``None`` is a large size.
        """
        if kind not in self.kinds:
            return _no(f"the policy names {', '.join(self.kinds) or 'no kind'} only")
        if numel is not None and numel * dtype.itemsize < self.min_bytes:
            count = numel * dtype.itemsize
            size = f"{count:,}" if isinstance(count, int) else str(count)
            return _no(f"{size} bytes are fewer than the policy's min_bytes of {self.min_bytes:,}")
        if isinstance(numel, torch.SymInt):
            if self.codec.payload_bytes(numel) >= numel * dtype.itemsize:
                return _no(f"{numel} elements are so few that {self.codec} sends no fewer bytes")
            numel = None
        return decide(kind, LARGE if numel is None else numel, dtype, world, self.codec, self.link or _SLOW)


def policy(given: str | Codec | Policy) -> Policy:
    """A policy, or that of a codec or its name.

    Raises:
        InputError: anything else.
    """
    if isinstance(given, Policy):
        return given
    if not isinstance(given, (str, Codec)):
        raise InputError(f"comm is a codec, its name or a qpass.comm.Policy, not {type(given).__name__}.")
    return Policy(codec(given))


def _no(reason: str) -> Decision:
    return Decision(False, math.nan, math.nan, None, reason)
