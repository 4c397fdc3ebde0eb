"""One process a system: a peer that crashes, hangs or spins its threads does it alone.

The parent gives the turns, one worker at a time, so measurements interleave and never overlap.
"""

from __future__ import annotations

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks.measure import pin_threads, sqnr, turn
from models import MODELS, fresh_inputs

CALIBRATION_BATCHES = 4
HELD_OUT_SEED = 1000  # calibration uses seeds 0, 1, ...


class Worker:
    """A system built in a process of its own; ``facts`` holds what the build told: ``sqnr`` (dB or None), ``kernels``.

    Raises RuntimeError with the reason when the build fails, takes longer than ``timeout`` seconds, or dies.
    """

    def __init__(self, build: Callable[..., Any], case: str, size: str, threads: int, timeout: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, case, size, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._receive(timeout)

    def turn(self, seconds: float) -> tuple[list[float], float]:
        """(Milliseconds of every call, CPU seconds the process spent) in one turn on the held-out input."""
        self._pipe.send(seconds)
        return self._receive(60 + 20 * seconds)

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def _receive(self, timeout: float) -> Any:
        try:
            if not self._pipe.poll(timeout):
                raise RuntimeError(f"no answer within {timeout:.0f} s")
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"the process died with exit code {self._process.exitcode}") from None
        except RuntimeError:
            self.stop()
            raise
        if isinstance(answer, str):
            self.stop()
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, build: Callable[..., Any], case: str, size: Any, threads: int) -> None:
    """Build, send the facts (or the reason as a string), then answer every number of seconds with a turn."""
    pin_threads(threads)
    model, example_inputs = MODELS[case](size)
    held_out = fresh_inputs(example_inputs, HELD_OUT_SEED)
    try:
        with torch.no_grad():
            reference = model(*held_out)
        batches = [fresh_inputs(example_inputs, seed) for seed in range(CALIBRATION_BATCHES)]
        system = build(model, example_inputs, batches)
        outputs = system(*held_out)
    except Exception as error:  # a peer may fail in any way it likes
        traceback.print_exc()
        reason = str(error).strip().splitlines() or [""]
        pipe.send(f"{type(error).__name__}: {reason[0]}")
        return
    figure = None if outputs is None else sqnr(reference, outputs)
    pipe.send({"sqnr": figure, "kernels": dict(getattr(system, "kernels", {}))})
    while True:
        seconds, spent = pipe.recv(), time.process_time()
        pipe.send((turn(system, held_out, seconds=seconds), time.process_time() - spent))
