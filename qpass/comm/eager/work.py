"""Work: the result of an asynchronous call. It is waited for like torch's own, and has a Future for hooks."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager.group import Group


class Work(dist.Work):
    """A job on a group's thread. `get_future` completes with ``[tensor]``, as torch's works do."""

    def __init__(self, group: Group, job: Callable[[], None], result: Tensor) -> None:
        super().__init__()
        devices: list[int | str | torch.device] = [result.device] if result.is_cuda else []
        self._future: torch.futures.Future[list[Tensor]] = torch.futures.Future(devices=devices)
        ready = torch.cuda.current_stream(result.device).record_event() if result.is_cuda else None

        def run(_: dist.ProcessGroup) -> None:
            try:
                with torch.no_grad():
                    if ready is not None:
                        torch.cuda.set_device(result.device)
                        torch.cuda.current_stream().wait_event(ready)
                    job()
            except BaseException as error:
                self._future.set_exception(error)  # type: ignore[arg-type]  # it takes whatever can be raised
            else:
                self._future.set_result([result])

        group.line().submit(run, group.process_group)  # held until the job is done: nothing else may hold it

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the result is there; errors of the job are raised here. The group's own timeout holds."""
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Whether the result is there, or an error is."""
        return self._future.done()

    def is_success(self) -> bool:
        """Whether the result is there."""
        return self._future.done() and self.exception() is None

    def exception(self) -> Any:
        """The job's error, or None."""
        try:
            self._future.value()
        except Exception as error:
            return error
        return None

    def result(self) -> list[Tensor]:
        """``[tensor]``, once it is there."""
        return self._future.wait()

    def get_future(self) -> Any:
        """A `torch.futures.Future` of ``[tensor]``."""
        return self._future
