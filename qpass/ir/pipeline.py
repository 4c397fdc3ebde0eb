"""Passes in order, as a value; what every pass needs around it is done here, once."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from torch import fx

from qpass.ir.frame import Pass
from qpass.ir.record import Stage, graph_record
from qpass.ir.regions import regions
from qpass.ir.verify import verify

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PassRun:
    """One pass over one graph: how many changes it made, and its time in seconds."""

    name: str
    changes: int
    seconds: float


class Watcher(Protocol):
    """Somebody who wants to see what the passes of this process do; see :data:`WATCHERS`."""

    def is_watching(self) -> bool: ...
    def is_recording(self) -> bool: ...
    def start(self, gm: fx.GraphModule, stage: Stage) -> None: ...
    def after(self, gm: fx.GraphModule, run: PassRun) -> None: ...


WATCHERS: list[Watcher] = []
"""Asked at the start of every pipeline; those that watch see the graph then and after each pass, untimed."""


def is_recorded() -> bool:
    """Whether somebody waits for the passes that would run now: then no cache may spare them."""
    return any(watcher.is_recording() for watcher in WATCHERS)


def watch(gm: fx.GraphModule, stage: Stage) -> list[Callable[[fx.GraphModule, PassRun], None]]:
    """Show ``gm`` to all who watch, before its passes run; returns what is to be called after each of them."""
    watching = [watcher for watcher in WATCHERS if watcher.is_watching()]
    for watcher in watching:
        watcher.start(gm, stage)
    return [watcher.after for watcher in watching]


def run_pass(
    step: Pass, gm: fx.GraphModule, graphs: Iterable[fx.GraphModule], after: Iterable[Callable[..., None]]
) -> PassRun:
    """Run one pass over each of ``graphs``, regions of ``gm``, and tell those who are to know ``after`` it.

    Dead code goes where the pass changed something.
    """
    start = time.perf_counter()
    changes = 0
    for graph in graphs:
        step.requires(graph)
        changed = step.run(graph)
        if changed:
            graph.graph.eliminate_dead_code()
        step.ensures(graph)
        changes += changed
    run = PassRun(step.name, changes, time.perf_counter() - start)
    log.debug("%s: %d changes in %.1f ms", run.name, run.changes, run.seconds * 1e3)
    for callback in after:
        callback(gm, run)
    return run


@dataclass(frozen=True)
class Pipeline:
    """``passes`` run in order over a graph and all its regions; the result is at ``stage`` and obeys its spec.

    ``between`` is called after each pass with the graph and its :class:`PassRun`; verification between passes is one
    such callback, as recording is.
    """

    stage: Stage
    passes: tuple[Pass, ...]

    def run(
        self, gm: fx.GraphModule, between: Sequence[Callable[[fx.GraphModule, PassRun], None]] = ()
    ) -> list[PassRun]:
        """Run on ``gm`` in place. Dead code goes after each pass that changed something.

        The caller rebuilds ``gm`` when all is done, which generates its code.
        """
        runs = []
        watching = watch(gm, self.stage)
        for step in self.passes:
            runs.append(run_pass(step, gm, list(regions(gm)), (*between, *watching)))
        graph_record(gm).stage = self.stage
        verify(gm, self.stage)
        return runs


@contextmanager
def without_gc() -> Iterator[None]:
    """Leave reference cycles for later. Passes make none to speak of, but so many nodes that looking takes a quarter
    of their time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
