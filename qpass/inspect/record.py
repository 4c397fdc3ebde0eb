"""``qpass.record()``: what every pass did, one diff each; the same diffs in the log and in tlparse.

``TORCH_LOGS="+qpass"`` prints a diff for every pass that changed something, and with ``TORCH_TRACE`` each becomes an
artifact that tlparse shows, without a recording in the code.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from qpass.errors import InputError, near
from qpass.inspect.changes.pass_data import PassData
from qpass.inspect.diff import GraphDiff, diff
from qpass.inspect.render.record_text import html, text
from qpass.inspect.snapshot import snapshot
from qpass.inspect.values.nodes import Snapshot
from qpass.ir.pipeline import RECORDERS, PassRun, remarks
from qpass.ir.record import Stage
from qpass.torch_private import trace_log, trace_structured

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRecord(PassData):
    """One pass over one graph, with a diff that can be printed and saved; :class:`PassData` has its content."""

    diff: GraphDiff


@dataclass
class Recording:
    """The passes that ran, in order. ``str(recording)`` is a table; ``recording["fold_batch_norm"]`` is one of them."""

    passes: list[PassRecord] = field(default_factory=list)

    def __getitem__(self, name: str) -> PassRecord:
        """The last run of the pass of this name."""
        for found in reversed(self.passes):
            if found.name == name:
                return found
        known = dict.fromkeys(found.name for found in self.passes)
        raise InputError(f"no pass {name!r} ran{near(name, known)}", hint=f"these ran: {', '.join(known) or 'none'}")

    def __iter__(self) -> Iterator[PassRecord]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __str__(self) -> str:
        return text(self.passes)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": html(self.passes)}

    def run(self, step: Callable[..., Any], gm: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        """Call a pass from outside qpass, ``step(gm, *args, **kwargs)``, and record it. Returns what it returns.

        The pass may edit ``gm``, or return a graph module, or something with a ``graph_module`` (as the passes of
        ``torch.fx`` do). Passes of qpass that it calls are recorded by themselves, before it.
        """
        before = snapshot(gm)
        start = time.perf_counter()
        result = step(gm, *args, **kwargs)
        seconds = time.perf_counter() - start
        made = getattr(result, "graph_module", result)
        found = replace(diff(before, made if isinstance(made, fx.GraphModule) else gm), name=_name(step))
        self.passes.append(PassRecord(found.name, "", None, seconds, found))
        return result


_ACTIVE: ContextVar[tuple[Recording, ...]] = ContextVar("qpass_recordings", default=())


@contextmanager
def record() -> Iterator[Recording]:
    """Record every pass that runs in the block: in ``prepare``, ``convert``, ``lower``, the backend, and by ``run``.

    ::

        with qpass.record() as passes:
            quantized = qpass.convert(prepared)
            passes.run(my_pass, quantized)
        print(passes)                           # which pass changed what, and its milliseconds
        passes["fold_batch_norm"].diff          # just that

    Only what runs in this thread is recorded. Blocks may be nested; each sees what runs in it.
    """
    found = Recording()
    token = _ACTIVE.set((*_ACTIVE.get(), found))
    try:
        yield found
    finally:
        _ACTIVE.reset(token)


class _DiffRecorder:
    """Takes a snapshot where a pipeline starts and a diff after each pass, for recordings, log and trace."""

    def __init__(self) -> None:
        self._stage: ContextVar[tuple[Stage | str, Snapshot | None]] = ContextVar("qpass_stage", default=("", None))

    def is_recording(self) -> bool:
        return bool(_ACTIVE.get())

    def is_active(self) -> bool:
        return self.is_recording() or log.isEnabledFor(logging.DEBUG) or _is_traced()

    def start(self, gm: fx.GraphModule, stage: Stage) -> None:
        self._stage.set((stage, snapshot(gm)))

    def after(self, gm: fx.GraphModule, run: PassRun) -> None:
        stage, before = self._stage.get()
        now = snapshot(gm)
        assert before is not None
        changed = replace(diff(before, now), name=f"{run.name} (to {stage})")
        found = PassRecord(run.name, stage, run.changes, run.seconds, changed, tuple(remarks([run])))
        self._stage.set((stage, now))
        for recording in _ACTIVE.get():
            recording.passes.append(found)
        if found.changed:
            printed = functools.cache(lambda: str(found.diff))
            log.debug("%s", _Late(printed))
            name = f"qpass_{stage}_{run.name}"
            trace_structured("artifact", lambda: {"name": name, "encoding": "string"}, payload_fn=printed)


class _Late:
    """Text that is made when a log record is written, and not before."""

    def __init__(self, make: Callable[[], str]) -> None:
        self.make = make

    def __str__(self) -> str:
        return self.make()


def _is_traced() -> bool:
    """Whether the structured trace is written: torch always has a handler, which mostly has no folder to write to."""
    return any(getattr(handler, "root_dir", True) for handler in trace_log.handlers)


def _name(step: Any) -> str:
    while isinstance(step, functools.partial):
        step = step.func
    return getattr(step, "__qualname__", type(step).__name__)


RECORDERS.append(_DiffRecorder())
