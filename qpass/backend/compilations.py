"""The compilations of this process, kept for the report: lowered graphs and what became of collectives."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.backend.compiled_collectives import CompiledCollectives
from qpass.backend.live_constants import pick

Weights = tuple[weakref.ref[torch.UntypedStorage], ...]
"""The memory of weights. A tensor that something refers to, even weakly, cannot be swapped by ``swap_tensors``."""


@dataclass(frozen=True)
class Compilation:
    """One compilation: its lowered graph, None where compute was left as it is, and the collectives that it compresses.

    It is found by the weights that it read, or by the code that it was compiled from, and is kept as long as one of
    these lives. Where Dynamo runs one graph for several models, the weights are those of all.
    """

    graph: fx.GraphModule | None
    collectives: CompiledCollectives | None
    weights: dict[tuple[int, ...], Weights]
    code: weakref.ref[CodeType] | None

    @property
    def is_alive(self) -> bool:
        """Whether one of its weights lives, or, where it has none, its code."""
        if self.has_weights:
            return any(ref() is not None for weights in self.weights.values() for ref in weights)
        return self.code is not None and self.code() is not None

    @property
    def has_weights(self) -> bool:
        """Whether it reads any."""
        return any(self.weights.values())

    def reads(self, storages: set[int], alone: bool = False) -> bool:
        """Whether, at some call, one of its weights lay in the storages with these ids; ``alone``: all of them."""
        for weights in list(self.weights.values()):
            alive = [id(storage) in storages for ref in weights if (storage := ref()) is not None]
            if alive and (all(alive) if alone else any(alive)):
                return True
        return False

    def is_part_of(self, code: CodeType) -> bool:
        """Whether it was compiled from this code, or from what follows a graph break in it."""
        root = self.code() if self.code is not None else None
        lines = [line for *_, line in code.co_lines() if line is not None]
        if root is None or root.co_filename != code.co_filename:
            return False
        return min(lines) <= root.co_firstlineno <= max(lines)

    def noting(self, call: Callable[..., Any], positions: Sequence[int]) -> Callable[..., Any]:
        """``call``, which notes the tensors that it is given at ``positions``: the weights of the model that runs."""
        chosen = pick(positions)

        def noted(*arguments: Any) -> Any:
            weights = chosen(arguments)
            key = _key(weights)
            if key not in self.weights:
                for known, refs in list(self.weights.items()):
                    if all(ref() is None for ref in refs):
                        self.weights.pop(known, None)
                self.weights[key] = _memory(weights)
            return call(*arguments)

        return noted


_COMPILED: list[Compilation] = []


def remember(
    graph: fx.GraphModule | None, weights: Iterable[torch.Tensor], collectives: CompiledCollectives | None = None
) -> Compilation:
    """Keep a compilation until the last of its weights is freed, or, where it has none, its code."""
    code = next(iter(torch_private.get_traced_code() or ()), None)
    _COMPILED[:] = [kept for kept in _COMPILED if kept.is_alive]
    read = tuple(weights)
    known = {_key(read): _memory(read)}
    _COMPILED.append(Compilation(graph, collectives, known, weakref.ref(code) if code is not None else None))
    return _COMPILED[-1]


def _key(weights: tuple[torch.Tensor, ...]) -> tuple[int, ...]:
    """Which tensors they are, and where their values lie: ``weight.data = other`` makes another key."""
    ids = tuple(map(id, weights))
    try:
        return ids + tuple(map(torch.Tensor.data_ptr, weights))
    except RuntimeError:  # fake tensors and packed ones have no address
        return ids


def _memory(tensors: Iterable[torch.Tensor]) -> Weights:
    return tuple(weakref.ref(tensor.untyped_storage()) for tensor in tensors if tensor.layout == torch.strided)


def program_of(called: Any) -> Any:
    """The model or function behind what ``torch.compile`` returned or changed in place; None where it did neither.

    In place: ``model.compile()``, ``model.forward = torch.compile(model.forward)``, and either for a part of a model.
    """
    if isinstance(called, torch_private.OptimizedModule):
        return called._orig_mod
    original = getattr(called, "_torchdynamo_orig_callable", None)
    if original is not None:
        owner = getattr(original, "__self__", None)
        return owner if isinstance(owner, torch.nn.Module) else original
    if isinstance(called, torch.nn.Module) and any(map(_is_compiled, called.modules())):
        return called
    return None


def _is_compiled(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    in_place = module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")
    return in_place or isinstance(module, torch_private.OptimizedModule)


def compilations(program: torch.nn.Module | Callable[..., Any]) -> list[Compilation]:
    """The compilations of a model or a function: those that read its tensors, and those that come from its code.

    The models of a function are those that it closes over, and those among the globals that it names. A compilation
    that reads weights does not belong to a model without weights, whatever its code. One that also reads weights of
    other models, as where two models share a tensor, counts only where the model has no compilation of its own.
    """
    is_model = isinstance(program, torch.nn.Module)
    function: Any = type(program).forward if isinstance(program, torch.nn.Module) else inspect.unwrap(program)
    code = getattr(function, "__code__", None)
    tensors = (tensor for module in modules_of(program) for tensor in [*module.parameters(), *module.buffers()])
    held = [ref() for ref in _memory(tensors)]
    storages = set(map(id, held))

    def found(alone: bool) -> list[Compilation]:
        return [
            one for one in _COMPILED
            if one.reads(storages, alone)
            or (code is not None and not (is_model and one.has_weights) and one.is_part_of(code))
        ]  # fmt: skip

    return found(alone=is_model) or found(alone=False)


def compiled_graphs(model: torch.nn.Module) -> list[fx.GraphModule]:
    """The lowered graphs that the backend compiled for ``model``: those that read its tensors."""
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
    """Whether this is the first question about ``what`` for the model or function that compiles now.

    It counts as one for its user, however many graphs it falls into and however often it is compiled again.
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
