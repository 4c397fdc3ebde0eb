"""A graph module that takes the source of its code with it when it goes."""

from __future__ import annotations

import linecache
import weakref
from typing import Any

from torch import fx


class GraphModule(fx.GraphModule):
    """torch.fx keeps the text of every ``forward`` it ever generated, for tracebacks; here until the module is gone.

    Some kilobytes each, several for each model that is prepared and converted: a process that quantizes models all
    day would grow by them for ever.
    """

    def recompile(self) -> Any:
        code = super().recompile()
        file = type(self).forward.__code__.co_filename
        weakref.finalize(self, _forget, file).atexit = False
        return code


class Draft(GraphModule):
    """One whose graph is still being changed: it has no code, and cannot be called before it is rebuilt."""

    def recompile(self) -> Any:
        """Nothing: the code would be that of a graph that is about to change."""


def _forget(file: str) -> None:
    linecache.cache.pop(file, None)
    sources = getattr(getattr(fx.graph_module, "_loader", None), "eval_cache", None)
    if sources is not None:
        sources.pop(file, None)
