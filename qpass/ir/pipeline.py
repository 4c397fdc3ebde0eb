"""Pipeline: passes in order, as a value. It verifies, times and records every pass."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from torch import fx

from qpass.errors import ConfigError, InputError, near
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.record import Stage, graph_record
from qpass.ir.regions import regions
from qpass.ir.verify import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRun:
    """One pass over a graph and its regions: what it did, and its time in seconds."""

    name: str
    result: PassResult
    seconds: float

    @property
    def changes(self) -> int:
        """The number of changes that it made."""
        return self.result.changed


class Recorder(Protocol):
    """What wants to see the work of the passes in this process; see :data:`RECORDERS`."""

    def is_active(self) -> bool: ...
    def is_recording(self) -> bool: ...
    def start(self, gm: fx.GraphModule, stage: Stage) -> None: ...
    def after(self, gm: fx.GraphModule, run: PassRun) -> None: ...


RECORDERS: list[Recorder] = []
"""Asked at the start of every pipeline. Active ones see the graph then and after each pass, untimed."""

Callback = Callable[[fx.GraphModule, PassRun], None]


def is_recorded() -> bool:
    """Whether a recorder waits for the passes that would run now. Then no cache may skip them."""
    return any(recorder.is_recording() for recorder in RECORDERS)


@dataclass(frozen=True)
class Pipeline:
    """``passes`` run in order over a graph and all its regions; the result is at ``stage`` and obeys its spec.

    A pipeline is a value: `before`, `after`, `without` and `replace` make another one. ``foreign``: the graph belongs
    to somebody else, as a fresh trace and Inductor's post-grad graph do. Its regions are left to the passes, it is
    linted and not verified, and its record is left alone.
    """

    stage: Stage
    passes: tuple[Pass, ...]
    foreign: bool = False

    def run(self, gm: fx.GraphModule, between: Sequence[Callback] = ()) -> list[PassRun]:
        """Run on ``gm`` in place. Dead code goes after each pass that changed something.

        ``between`` is called after each pass with the graph and its :class:`PassRun`. What passes note and refuse is
        kept in the graph's record, for the report. The caller rebuilds ``gm`` when all is done, which generates its
        code.

        Raises:
            InputError: a pass returned something other than a `PassResult`.
            VerifyError: the result breaks the spec of ``stage``.
        """
        watching = [recorder for recorder in RECORDERS if recorder.is_active()]
        for recorder in watching:
            recorder.start(gm, self.stage)
        runs = []
        for step in self.passes:
            runs.append(_run(step, gm, self.foreign))
            for callback in (*between, *(recorder.after for recorder in watching)):
                callback(gm, runs[-1])
        if self.foreign:
            gm.graph.lint()
        else:
            record = graph_record(gm)
            record.stage = self.stage
            record.notes = list(dict.fromkeys((*record.notes, *remarks(runs))))
            record.passes = tuple(dict.fromkeys((*record.passes, *(run.name for run in runs))))
            verify(gm, self.stage)
        return runs

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the passes, in order."""
        return tuple(step.name for step in self.passes)

    def before(self, name: str, *passes: Pass) -> Pipeline:
        """The pipeline with ``passes`` before the first pass of this name.

        Raises:
            ConfigError: no pass has this name, with the nearest one.
            InputError: something given is not a pass.
        """
        return self._spliced(self._places(name)[0], 0, passes)

    def after(self, name: str, *passes: Pass) -> Pipeline:
        """The pipeline with ``passes`` after the last pass of this name; raises as `before` does."""
        return self._spliced(self._places(name)[-1] + 1, 0, passes)

    def without(self, name: str) -> Pipeline:
        """The pipeline without the passes of this name; raises as `before` does."""
        places = self._places(name)
        return replace(self, passes=tuple(step for place, step in enumerate(self.passes) if place not in places))

    def replace(self, name: str, *passes: Pass) -> Pipeline:
        """The pipeline with ``passes`` instead of each pass of this name; raises as `before` does."""
        result = self
        for place in reversed(self._places(name)):
            result = result._spliced(place, 1, passes)
        return result

    def _places(self, name: str) -> list[int]:
        places = [place for place, known in enumerate(self.names) if known == name]
        if not places:
            raise ConfigError(
                f"the pipeline to the {self.stage} stage has no pass {name!r}{near(name, self.names)}",
                hint=f"its passes are {', '.join(self.names) or 'none'}",
            )
        return places

    def _spliced(self, place: int, dropped: int, passes: tuple[Pass, ...]) -> Pipeline:
        for step in passes:
            if not isinstance(step, Pass):
                what = f"a pipeline takes passes, and was given {step!r}"
                raise InputError(what, hint="derive from qpass.passes.Pass, and give an object, not the class")
        return replace(self, passes=(*self.passes[:place], *passes, *self.passes[place + dropped :]))


def _run(step: Pass, gm: fx.GraphModule, alone: bool) -> PassRun:
    """Run one pass over ``gm`` and, unless it does so itself or is to leave them ``alone``, over the regions."""
    start = time.perf_counter()
    total = PassResult()
    for graph in [gm] if alone or step.whole else list(regions(gm)):
        step.requires(graph)
        result = _as_result(step, step.run(graph))
        if result.changed and not step.whole:
            graph.graph.eliminate_dead_code()
        step.ensures(graph)
        total += result
    run = PassRun(step.name, total, time.perf_counter() - start)
    log.debug("%s: %d changes in %.1f ms", run.name, run.changes, run.seconds * 1e3)
    return run


def _as_result(step: Pass, returned: object) -> PassResult:
    if isinstance(returned, PassResult):
        return returned
    if isinstance(returned, int):
        return PassResult(returned)
    raise InputError(
        f"the pass {step.name} returned {type(returned).__name__}, which is not the result of a pass",
        hint="return qpass.passes.PassResult(changed, notes, refusals), or the number of changes",
    )


def remarks(runs: Sequence[PassRun]) -> Iterator[str]:
    """What passes noted, and what they refused, as sentences for a report."""
    for run in runs:
        yield from run.result.notes
        yield from (f"not done by {run.name}: {refusal}" for refusal in run.result.refusals)


@contextmanager
def without_gc() -> Iterator[None]:
    """Let the garbage collector wait. Passes make hardly any reference cycles, but so many nodes that looking for them
    takes a quarter of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
