"""What the backend compiled, kept for the report: lowered graphs and decisions about collectives."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import get_traced_code

from qpass.communication import Communication


@dataclass(frozen=True)
class Compiled:
    """One compilation: its lowered graph, None where compute was left as it is, and its communication, if any.

    It is found by the weights that it reads or the code that it was compiled from, and kept as long as one of them is.
    """

    graph: fx.GraphModule | None
    communication: Communication | None
    weights: tuple[weakref.ref[torch.Tensor], ...]
    code: weakref.ref[CodeType] | None

    @property
    def is_alive(self) -> bool:
        """Whether one of its weights lives, or, where it has none, its code."""
        refs = self.weights or (() if self.code is None else (self.code,))
        return any(ref() is not None for ref in refs)

    def reads(self, tensors: set[int]) -> bool:
        """Whether one of its weights is among the tensors with these ids."""
        return any((tensor := ref()) is not None and id(tensor) in tensors for ref in self.weights)

    def is_part_of(self, code: CodeType) -> bool:
        """Whether it was compiled from this code, or from what follows a graph break in it."""
        root = self.code() if self.code is not None else None
        lines = [line for *_, line in code.co_lines() if line is not None]
        if root is None or root.co_filename != code.co_filename:
            return False
        return min(lines) <= root.co_firstlineno <= max(lines)


_COMPILED: list[Compiled] = []


def remember(
    graph: fx.GraphModule | None, weights: Iterable[torch.Tensor], communication: Communication | None = None
) -> None:
    """Keep what is compiled now until the last of its weights is gone, or, where it has none, its code."""
    code = next(iter(get_traced_code() or ()), None)
    _COMPILED[:] = [kept for kept in _COMPILED if kept.is_alive]
    refs = tuple(weakref.ref(tensor) for tensor in weights)
    _COMPILED.append(Compiled(graph, communication, refs, weakref.ref(code) if code is not None else None))


def compilations(program: torch.nn.Module | Callable[..., Any]) -> list[Compiled]:
    """What was compiled for a model or a function: what reads one of its tensors, and what comes from its code.

    The models of a function are those that it closes over, and those among the globals that it names. What reads
    weights was not compiled for a model without them, whatever its code.
    """
    is_model = isinstance(program, torch.nn.Module)
    function: Any = type(program).forward if isinstance(program, torch.nn.Module) else inspect.unwrap(program)
    code = getattr(function, "__code__", None)
    tensors = {id(tensor) for module in modules_of(program) for tensor in [*module.parameters(), *module.buffers()]}
    return [
        one for one in _COMPILED
        if one.reads(tensors) or (code is not None and not (is_model and one.weights) and one.is_part_of(code))
    ]  # fmt: skip


def compiled_graphs(model: torch.nn.Module) -> list[fx.GraphModule]:
    """The lowered graphs that the backend compiled for ``model``: those that read one of its tensors."""
    return [one.graph for one in compilations(model) if one.graph is not None]


def modules_of(program: Any) -> list[torch.nn.Module]:
    """A model itself, that of a bound method, or the models that a function closes over or names as globals."""
    if not isinstance(program, torch.nn.Module) and callable(program):
        program = inspect.unwrap(program)
        program = getattr(program, "__self__", program)
    if isinstance(program, torch.nn.Module):
        return [program]
    names = inspect.getclosurevars(program) if inspect.isfunction(program) else None
    held = [*names.nonlocals.values(), *names.globals.values()] if names else []
    return [module for module in held if isinstance(module, torch.nn.Module)]


def program_compiled_now() -> Any:
    """What torch.compile was given and compiles at this call; None where its call is not among the callers."""
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code.co_name != "compile_wrapper":  # torch.compile's, around its argument
        frame = frame.f_back
    return frame.f_locals.get("fn") if frame is not None else None


_TOLD: dict[tuple[int, str], weakref.ref[Any]] = {}


def is_first(what: str) -> bool:
    """Whether ``what`` was not yet asked about for the compiled model or function whose call compiles now.

    However many graphs it falls into, and however often it is compiled again, it is one to its user.
    """
    program = program_compiled_now()
    if program is None:
        return True
    for key in [key for key, ref in _TOLD.items() if ref() is None]:
        del _TOLD[key]
    key = id(program), what
    told = key in _TOLD
    _TOLD[key] = weakref.ref(program)
    return not told
