"""qpass::encode_fed: `qpass::encode`, and what rounding takes from a tensor is added to the next one sent in its place.

    encode_fed(x, form, state)      v = float32(x) + residual -> encode(v), and residual becomes v - decode(encode(v))

The sum over many steps of what was sent is then that of what should have been, but for the last residual. The residuals
are no part of a graph: a `Feedback` holds them, and the graph names them by ``state``. So a compiled graph that a cache
serves in another process finds the residuals of that process. Where a value or its block is not finite, it was not
sent: the residual waits.
"""

from __future__ import annotations

import contextlib
import re
import warnings
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextvars import ContextVar

import torch
from torch import Tensor

from qpass.comm.wire.format import WireFormat
from qpass.comm.wire.operators import check_encode, cuts, decode_into, encode_into
from qpass.errors import ConfigError, InputError


class Feedback:
    """The residuals of one program's sums on this rank: ``Policy("int4", feedback=Feedback())``.

    Residuals are float32, as large as what is sent. ``"0/output_3"`` is named by its compiled frame, numbered as frames
    first send, and by where its gradient leaves the graph: so the same program names them alike in every process, and
    recompilations of a frame go on with its residuals. Programs that are trained apart need a Feedback each.
    """

    def __init__(self) -> None:
        self._residuals: dict[str, Tensor] = {}
        self._numbers: dict[Hashable, int] = {}
        self._parameters: dict[Hashable, list[weakref.ref[Tensor]]] = {}
        self._is_loaded = False

    def __repr__(self) -> str:
        return "Feedback()"  # a part of keys of caches, which other processes read

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of this rank's residuals by name. Save it on every rank, and load it on the same one."""
        return {name: residual.clone() for name, residual in self._residuals.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave, before or after anything was compiled.

        Sizes are compared when a residual is used. One that is used then and not in ``state`` starts from zero, with
        a warning.

        Raises:
            InputError: something in ``state`` is no residual.
        """
        for name, residual in state.items():
            is_residual = isinstance(residual, Tensor) and residual.dtype == torch.float32 and residual.dim() == 1
            if not is_residual or not re.fullmatch(r"\d+/\w+", str(name)):
                what = f"{name!r} is no residual of error feedback."
                raise InputError(what, hint="load what state_dict() of a qpass.comm.Feedback gave")
        self._residuals = {name: residual.clone() for name, residual in state.items()}
        self._is_loaded = True

    def reset(self) -> None:
        """Forget all residuals, as where training starts anew."""
        self._residuals.clear()
        self._is_loaded = False

    @contextlib.contextmanager
    def bound(self, frame: Hashable = None) -> Iterator[None]:
        """Let the graphs that run inside find their residuals here; ``frame`` tells those of one frame from another's.

        Compiled graphs do so themselves; one that `compress` edited is run ``with feedback.bound()``.
        """
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

    def residual(self, frame: Hashable, state: str, x: Tensor) -> Tensor:
        """What is to be added to ``x``: float32 ``[x.numel()]`` on its device, zeros at first; to be written to.

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
        return found


_bound: ContextVar[tuple[Feedback, Hashable] | None] = ContextVar("qpass_feedback", default=None)


def residual_of(state: str, x: Tensor) -> Tensor:
    """`Feedback.residual` of the Feedback that is bound.

    Raises:
        InputError: none is.
    """
    bound = _bound.get()
    if bound is None:
        what = f"encode_fed is run without a Feedback, and {state} is to be sent with error feedback."
        raise InputError(what, hint="run the graph `with feedback.bound():`, with the feedback of its policy")
    feedback, frame = bound
    return feedback.residual(frame, state, x)


def encode_fed_into(x: Tensor, residual: Tensor, payload: Tensor, wire: WireFormat) -> None:
    """Write the payload of ``x + residual`` to ``payload``, and what it lacks to ``residual``; all are flat."""
    for part, coded in cuts(x.numel(), wire):
        values = x[part].to(torch.float32) + residual[part]
        encode_into(values, payload[coded], wire)
        decoded = torch.empty_like(values)
        decode_into(payload[coded], decoded, wire)
        error = values.sub_(decoded)  # not finite where nothing was sent
        if error.device.type == "cpu" and error.sum().isfinite():  # a mask takes longer than all the rest
            residual[part].copy_(error)
        else:
            torch.where(error.isfinite(), error, residual[part], out=residual[part])


def encode_fed(x: Tensor, form: str, state: str) -> Tensor:
    """The payload of ``x`` and its residual, in the format of `qpass::encode`; a new uint8 tensor of one dimension."""
    wire = check_encode(x, form)
    payload = torch.empty(wire.payload_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    encode_fed_into(x.detach().reshape(-1), residual_of(state, x), payload, wire)
    return payload


# Two calls give two payloads, so it is tagged as random numbers are: compilers neither merge nor repeat them.
_library = torch.library.Library("qpass", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)
_library.define("encode_fed(Tensor x, str form, str state) -> Tensor", tags=_TAGS)
_library.impl("encode_fed", encode_fed, "CompositeExplicitAutograd")


@torch.library.register_fake("qpass::encode_fed", lib=_library)
def _encode_fed_meta(x: Tensor, form: str, state: str) -> Tensor:
    return x.new_empty(check_encode(x, form).payload_bytes(x.numel()), dtype=torch.uint8)
