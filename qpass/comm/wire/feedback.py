"""Feedback: the residuals of a compiled program on this rank, which `qpass.comm.wire.fed_rounding` keeps.

The residuals are not part of a graph: a `Feedback` holds them, and the graph names them by ``state``. So a compiled
graph that a cache serves in another process finds the residuals of that process.
"""

from __future__ import annotations

import contextlib
import re
import warnings
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qpass.comm.wire.rank_state import check_complete, own_state, state_of_rank
from qpass.errors import ConfigError, InputError


class Residual(NamedTuple):
    """What rounding took: float32 ``[numel]``, to be multiplied by the unit of the values it is added to."""

    values: Tensor
    unit: float = 1.0


class Feedback:
    """The residuals of one program's sums on this rank: ``Policy("int4", feedback=Feedback())``.

    Residuals are float32, as large as what is sent; sums of narrower gradients have one more for their last cast.
    ``"0/output_3"`` is named by its compiled frame, numbered as frames first send, and by where its gradient leaves the
    graph: so the same program names them alike in every process, and recompilations of a frame go on with its
    residuals. Programs that are trained apart need a Feedback each.

    Args:
        scaler: the GradScaler of the training. Residuals then follow the loss scale, and what was taken from them since
            its last ``update`` is put back where that lowers the scale: the optimizer skipped those gradients. It costs
            another float32 copy of what is sent, and the scale is read once for each run of a graph. Without it a
            residual counts in units of the scale of its own step.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._residuals: dict[str, Tensor] = {}
        self._before: dict[str, Tensor] = {}  # the residuals before the scaler's running step
        self._step = (0.0, 0)  # the loss scale and the steps since it changed: another pair after each update
        self._numbers: dict[Hashable, int] = {}
        self._parameters: dict[Hashable, list[weakref.ref[Tensor]]] = {}
        self._is_loaded = False

    def __repr__(self) -> str:
        return "Feedback()"  # a part of keys of caches, which other processes read

    def state_dict(self) -> dict[str, Any]:
        """The number of ranks, and copies of this rank's residuals by name. Save it on every rank.

        The part of this rank lies under a key that names the rank, so that `torch.distributed.checkpoint` keeps the
        parts of all ranks. It loads into tensors that exist: let the program make a step before its
        state is loaded.
        """
        self._follow_scale()
        residuals = {name: residual.clone() for name, residual in self._residuals.items()}
        return state_of_rank({"count": len(residuals), "residuals": residuals})

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, on the same rank of as many ranks, before or after anything was compiled.

        Sizes are compared when a residual is used. One that is used then and not in ``state`` starts from zero, with
        a warning. Residuals belong to the ranks that rounded: another number of ranks starts without them.

        Raises:
            ConfigError: it was saved on another number of ranks, on another rank, or holds not all residuals.
            InputError: something in ``state`` is not a residual.
        """
        mine = own_state(state, "a qpass.comm.Feedback", "a new one")
        residuals = mine["residuals"]
        check_complete(len(residuals), mine["count"])
        for name, residual in residuals.items():
            is_residual = isinstance(residual, Tensor) and residual.dtype == torch.float32 and residual.dim() == 1
            if not is_residual or not re.fullmatch(r"\d+/\w+", str(name)):
                what = f"{name!r} is not a residual of error feedback"
                raise InputError(what, hint="load what state_dict() of a qpass.comm.Feedback gave")
        self._residuals = {name: residual.clone() for name, residual in residuals.items()}
        self._before.clear()
        self._is_loaded = True

    def reset(self) -> None:
        """Forget all residuals, as where training starts anew."""
        self._residuals.clear()
        self._before.clear()
        self._is_loaded = False

    @contextlib.contextmanager
    def bound(self, frame: Hashable = None) -> Iterator[None]:
        """Let the graphs that run inside find their residuals here; ``frame`` tells those of one frame from another's.

        Compiled graphs do so themselves; one that `compress` edited is run ``with feedback.bound()``: for every step
        anew where there is a scaler, whose scale is read here.
        """
        self._follow_scale()
        token = _bound.set((self, frame))
        try:
            yield
        finally:
            _bound.reset(token)

    def serve(self, frame: Hashable, parameters: Iterable[Tensor]) -> None:
        """Check that a frame is run for the parameters that it was first run for.

        Raises:
            ConfigError: it is not: the residuals are those of other gradients.
        """
        given = list(parameters)
        known = self._parameters.setdefault(frame, [weakref.ref(parameter) for parameter in given])
        if len(known) != len(given) or any(ref() is not one for ref, one in zip(known, given, strict=True)):
            what = "A graph that sends with error feedback is run for other parameters than those it was first run for."
            raise ConfigError(what, hint="compile the model as a whole, not layer by layer, and each model for itself")

    def residual(self, frame: Hashable, state: str, x: Tensor) -> Residual:
        """What is to be added to ``x``, zeros at first, and its unit; to be written to.

        Raises:
            ConfigError: the residual of that name is of another size.
        """
        name = f"{self._numbers.setdefault(frame, len(self._numbers))}/{state}"
        found = self._residuals.get(name)
        if found is None:
            if self._is_loaded:
                note = f"the loaded state of error feedback has no residual {name}: it starts from zero"
                warnings.warn(note, stacklevel=2)
            found = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
        elif found.numel() != x.numel():
            what = f"The residual {name} has {found.numel():,} elements, and {x.numel():,} are sent in its place."
            hint = "load the state of this program on as many ranks, give every program a Feedback, or reset() this one"
            raise ConfigError(what, hint=hint)
        self._residuals[name] = found = found.to(x.device)
        if self._scaler is None:
            return Residual(found)
        if name not in self._before:  # else one of several that are accumulated, and applied or skipped together
            self._before[name] = found.clone()
        return Residual(found, self._step[0])

    def _follow_scale(self) -> None:
        """Begin a step if the scaler has ended one: where its scale fell, that was skipped."""
        if self._scaler is None:
            return
        now = self._scaler.state_dict()
        step = now["scale"], now["_growth_tracker"]
        if step == self._step:
            return
        if step[0] < self._step[0]:
            for name, before in self._before.items():
                self._residuals[name].copy_(before)
        self._before.clear()
        self._step = step


_bound: ContextVar[tuple[Feedback, Hashable] | None] = ContextVar("qpass_feedback", default=None)


def residual_of(state: str, x: Tensor) -> Residual:
    """`Feedback.residual` of the Feedback that is bound.

    Raises:
        InputError: none is.
    """
    bound = _bound.get()
    if bound is None:
        what = f"A graph is run without a Feedback, and {state} is to be sent with error feedback."
        raise InputError(what, hint="run the graph `with feedback.bound():`, with the feedback of its policy")
    feedback, frame = bound
    return feedback.residual(frame, state, x)
