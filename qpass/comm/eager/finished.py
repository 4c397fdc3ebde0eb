"""Finished: an asynchronous collective together with what has to be done once its bytes are there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager.work import Work


class Finished(Work):
    """A Work that is complete when `work` is and `finish`, called once, has returned.

    Args:
        work: any `dist.Work` that has a future.
        finish: what to do then, on the thread that completed `work`, or on the caller's if that is already done.
        outputs: what the future holds.
    """

    def __init__(self, work: dist.Work, finish: Callable[[], None], outputs: Sequence[Tensor]) -> None:
        dist.Work.__init__(self)

        def after(future: torch.futures.Future[Any]) -> list[Tensor]:
            future.value()  # raises what went wrong
            with torch.no_grad():
                finish()
            return list(outputs)

        self._future = work.get_future().then(after)
