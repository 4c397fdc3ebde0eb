"""Policy: which collectives of a graph are sent compressed, and as what.

Policy("int8")                                      every kind but all_to_all, from 64 KiB on
Policy("int4:32:bf16:hadamard", kinds=("all_gather",), min_bytes=0)
Policy("int8", link=calibrate_link(group))          what pays by the cost model
Policy("int8").override("int4", backward=True)      another codec for the backward graphs
Policy("int8").keep_plain(module="head")            all but those of one module
Policy("int4", feedback=Feedback())                 sums of gradients with error feedback
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from qpass.comm.policy.collective_override import Override, Place, check_kind
from qpass.comm.policy.cost import Decision, Link, decide
from qpass.comm.wire.codec import Codec, codec
from qpass.comm.wire.feedback import Feedback
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
            Small payloads are sent together (``join``), plain tensors are not: where a program sends many small ones, a
            smaller ``min_bytes`` pays.
        link: constants of the groups, from `calibrate_link`, equal on all ranks; then the cost model decides, too.
            A size that is not known when a graph is compiled, or differs by rank, is taken for a large one.
        overrides: exceptions, the first that matches wins, whatever `kinds` says; add them with `override` and
            `keep_plain`.
        fuse: write codecs out in compiled graphs, for Inductor to fuse with what stands around them. That saves a pass
            over the tensor where a neighbour is elementwise, and makes Inductor compile each anew: a training step
            takes two to three times as long to compile. Otherwise graphs call kernels that were compiled once.
        join: send small payloads of a compiled graph together, where none depends on another. Which ones those are is
            read off the graph, so the ranks of a group compare what they send before the first step: switch it off
            where they run different programs.
        feedback: what rounding takes from the sums of gradients is kept there and added at the next step, if given;
            for one program's policy, and to be checkpointed on every rank; with a GradScaler, ``Feedback(scaler=...)``.
            It costs a float32 copy of what is sent and a second coding. Sums whose elements are others at every step,
            as of activations, do without, and say so.

    Raises:
        ConfigError: no such codec or kind, a stochastic codec, or no `Feedback`.
    """

    codec: Codec
    kinds: tuple[str, ...] = EVERYWHERE_EQUAL
    min_bytes: int = MIN_BYTES
    link: Link | None = None
    overrides: tuple[Override, ...] = ()
    fuse: bool = False
    join: bool = True
    feedback: Feedback | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", codec(self.codec))
        object.__setattr__(self, "kinds", (self.kinds,) if isinstance(self.kinds, str) else tuple(self.kinds))
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for kind in self.kinds:
            check_kind(kind)
        for override in self.overrides:
            if not isinstance(override, Override):
                raise ConfigError(f"Policy overrides must be qpass.comm.Override objects, not {override!r}")
        if not isinstance(self.feedback, Feedback | None):
            what = f"A policy's feedback is a qpass.comm.Feedback, not {type(self.feedback).__name__}."
            raise ConfigError(what, hint="make one, hand it to the policy and checkpoint it: feedback=Feedback()")
        for each in (self.codec, *(override.codec for override in self.overrides)):
            if each is not None and each.stochastic:
                what = f"A graph has one seed for all its calls, and {each} needs a new one each."
                raise ConfigError(what, hint="use a codec that rounds to nearest, or the calls of qpass.comm")

    def override(
        self, codec: str | Codec | None, *, kind: str | None = None, group: str | None = None,
        module: str | None = None, backward: bool | None = None, min_bytes: int | None = None,
    ) -> Policy:  # fmt: skip
        """A policy with one more override, tried after those it already has. Arguments as for `Override`."""
        one = Override(codec, kind, group, module, backward, min_bytes)  # type: ignore[arg-type]  # a name becomes a codec
        return replace(self, overrides=(*self.overrides, one))

    def keep_plain(
        self, *, kind: str | None = None, group: str | None = None, module: str | None = None,
        backward: bool | None = None, min_bytes: int | None = None,
    ) -> Policy:  # fmt: skip
        """A policy that leaves some more collectives as they are. Arguments as for `Override`."""
        return self.override(None, kind=kind, group=group, module=module, backward=backward, min_bytes=min_bytes)

    def resolve(self, place: Place, numel: int | torch.SymInt | None, dtype: torch.dtype) -> Policy | Decision:
        """What holds for one collective: a policy without overrides, or, where one of them keeps it plain, a decision.

        ``numel`` are the elements of the whole tensor, as for `decide`; None stands for a size that no rank can know of
        all, and is taken for a large one.
        """
        for index, override in enumerate(self.overrides):
            least = self.min_bytes if override.min_bytes is None else override.min_bytes
            if not override.matches(place) or (numel is not None and numel * dtype.itemsize < least):
                continue
            if override.codec is None:
                return _no(f"override {index} of the policy ({override}) leaves it plain")
            return replace(self, codec=override.codec, kinds=(place.kind,), min_bytes=least, overrides=())
        return replace(self, overrides=())

    def decide(self, kind: str, numel: int | torch.SymInt | None, dtype: torch.dtype, world: int) -> Decision:
        """Whether a collective of ``numel`` elements in the whole tensor is compressed, and why.

        A symbolic size is asked what `min_bytes` and the codec ask of any other, and so guards the graph: at another
        answer it is compiled anew, and ranks agree whatever sizes each has compiled for. Only a `link` takes it for a
        large one, so that with one all ranks must compile for the same sizes. ``None`` is a large size.
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


def policy(given: str | Codec | Policy | Mapping[str, Any]) -> Policy:
    """A policy, or that of a codec or its name, or of a policy's arguments by name, overrides as mappings, too.

    Raises:
        InputError: anything else.
        ConfigError: an unknown name, or a wrong value.
    """
    if isinstance(given, Policy):
        return given
    if isinstance(given, Mapping):
        known = dict(given)
        overrides = [_named(Override, one) if isinstance(one, Mapping) else one for one in known.get("overrides", ())]
        return _named(Policy, known | {"overrides": overrides})
    if not isinstance(given, (str, Codec)):
        what = f"comm is a codec, its name, a qpass.comm.Policy or a dict of its arguments, not {type(given).__name__}."
        raise InputError(what)
    return Policy(codec(given))


def _named(kind: type[Any], given: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(kind)]
    for name in given:
        if name not in known:
            what = f"comm: {kind.__name__} has no argument {name!r}{near(name, known)}."
            raise ConfigError(what, hint=f"use {', '.join(known)}")
    if "codec" not in given:
        raise ConfigError(f"comm: the {kind.__name__.lower()} {dict(given)} names no codec", hint="add 'codec'")
    return kind(**given)


def _no(reason: str) -> Decision:
    return Decision(False, math.nan, math.nan, None, reason)
