"""One gradient as DDP's reducer in Python gives it to a hook, in the form of a bucket.

With ``torch._dynamo.config.optimize_ddp = "python_reducer"`` DDP has no buckets: it calls a hook with each gradient and
its parameter, ignores what the hook returns, and expects the average in the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class PythonBucket:
    """What a hook asks of a bucket, for one gradient."""

    def __init__(self, gradient: Tensor, parameter: Tensor, index: int) -> None:
        self._gradient, self._parameter, self._index = gradient, parameter, index
        values = gradient.detach()
        if not values.is_sparse:
            values = (torch.view_as_real(values) if values.is_complex() else values).reshape(-1)
        self._buffer = values

    def index(self) -> int:
        """The parameter's place among those that the hook was given, counted from 0."""
        return self._index

    def buffer(self) -> Tensor:
        """The gradient in one dimension, a view where it can be one; complex numbers as pairs; sparse as it is."""
        return self._buffer

    def parameters(self) -> list[Tensor]:
        """The parameter, alone."""
        return [self._parameter]

    def is_last(self) -> bool:
        """Whether a step ends here, which nobody knows yet: `PythonReducer` counts steps."""
        return False

    def take(self, average: Tensor) -> None:
        """Write the average, which has the form of `buffer`, to the gradient."""
        with torch.no_grad():
            if average.is_sparse:  # no view of it could be written to
                self._gradient.copy_(average)
                return
            into = torch.view_as_real(self._gradient) if self._gradient.is_complex() else self._gradient
            if average.data_ptr() != into.data_ptr():
                into.copy_(average.view(into.shape))


class PythonReducer:
    """Counts the parameters that a hook is given one by one.

    Graphs break at a call of `average`, because no graph can hold what the hook keeps and counts.
    """

    def __init__(self) -> None:
        self._indices: Any = WeakIdKeyDictionary()
        self._given: set[int] = set()
        # Here, and not as a decorator, which would import Dynamo with this file.
        self.average: Any = torch.compiler.disable(self._average)

    def __reduce__(self) -> tuple[Any, ...]:
        return PythonReducer, ()  # a copy serves other parameters

    def _average(self, hook: Any, group: dist.ProcessGroup | None, gradient: Tensor, parameter: Tensor) -> None:
        """Have `hook` average a gradient in place.

        A step is over when a parameter comes again, so `hook.statistics` count it then.
        """
        index = self._indices.setdefault(parameter, len(self._indices))
        if index in self._given:
            hook.statistics.steps += 1
            self._given.clear()
        self._given.add(index)
        bucket = PythonBucket(gradient, parameter, index)
        bucket.take(hook(group, bucket).wait())
