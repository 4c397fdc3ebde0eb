"""Choices that a model's Python code makes in training, such as which layers to skip. A graph cannot hold them."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx

from qpass.errors import CaptureError
from qpass.ir.regions import regions, without_gradient
from qpass.ir.source import where

HINT = (
    "skip a layer by a random mask, as stochastic depth does, which is a branch of the graph: "
    "x + f(x) * torch.rand(x.shape[0], 1).lt(keep) / keep if self.training else x + f(x)"
)


@contextmanager
def choices_refused(model: str) -> Iterator[None]:
    """Refuse a trace inside this context that draws from the generators of Python or numpy. Their states are restored.

    Raises:
        CaptureError: it drew: the graph would hold that one draw for good.
    """
    numpy = sys.modules.get("numpy")
    before, array = random.getstate(), numpy.random.get_state(legacy=False) if numpy else None
    try:
        yield
        drawn = "random" if random.getstate() != before else ""
        if numpy and str(numpy.random.get_state(legacy=False)) != str(array):
            drawn = "numpy.random"
    finally:
        random.setstate(before)
        if numpy:
            numpy.random.set_state(array)
    if drawn:
        raise CaptureError(
            f"the model draws from Python's {drawn} in training, and a graph would hold the one number drawn",
            where=model, hint=HINT,
        )  # fmt: skip


def decided_by_value(error: CaptureError) -> CaptureError:
    """The error of a trace in training that fails on a branch of Python, where the trace in evaluation does not."""
    return CaptureError(
        "training decides by a value that the model computes or draws, and a graph holds no branch of Python",
        where=error.where, hint=HINT,
    )  # fmt: skip


def warn_of_regions(gm: fx.GraphModule) -> None:
    """Warn of each branch and loop of a captured graph that no gradient passes."""
    for region in regions(gm):
        for call in without_gradient(region):
            warnings.warn(
                f"no gradient passes {call.target.name()} at {where(call)}: the weights inside it, and those that "  # type: ignore[union-attr]
                "only it reads, stay as they are in training. Compute all of its branches and choose by torch.where, "
                "or write a loop out",
                stacklevel=4,
            )
