"""Constants that follow from weights, computed again when the weights are others than before.

A lowered graph reads ``packed = pack(codes)`` and ``scale = f(weight)``: constants that some pass derived from others
(:class:`~qpass.graph.constants.Derived`). Here is the chain from the tensors that the user may change, Dynamo's
arguments or the graph's own attributes, to the constants that the compiled code reads.

Dynamo runs one compiled graph for all models of one kind, for the layers of a transformer say, with the weights of
each in turn. So the derived constants are kept once per set of weights, and changing over costs next to nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, fx

from qpass.capture_dynamo import DynamoCapture
from qpass.errors import LowerError
from qpass.graph.constants import derived_constants
from qpass.graph.regions import regions
from qpass.watch import WeightWatch

_Key = tuple[str, int]  # ("argument", position), ("tensor", id) or ("derived", number)


@dataclass(frozen=True)
class _Step:
    """One derivation: its sources, and the constant that the graph reads, if it reads it."""

    sources: tuple[_Key, ...]
    compute: Callable[..., Tensor]
    constant: Tensor | None


@dataclass(frozen=True)
class _Weights:
    """One set of weights and what follows from them: a packed payload or a plain tensor per step that is read."""

    watch: WeightWatch
    values: dict[int, Tensor]
    held: tuple[Tensor, ...] = ()


class LiveConstants:
    """The constants of a lowered graph, in step with the weights they follow from.

    Packed constants are held by the compiled code and get another payload. Plain ones are arguments of the compiled
    code: ``enter`` returns them, in the order in which ``hold`` was called. Calls with the same weights may run at
    the same time; a call with other weights waits for them to end.
    """

    def __init__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], capture: DynamoCapture | None) -> None:
        self._bindings = capture.bindings if capture is not None else {}
        self._arguments = {id(example_inputs[index]): index for index in self._bindings.values()}
        self._fixed: dict[int, Tensor] = {}
        self._steps: list[_Step] = []
        self._derived: dict[int, int] = {}
        lowered = list(regions(gm))
        captured = list(regions(capture.graph_module)) if capture is not None else []
        for index, region in enumerate(lowered):
            self._add_region(region, captured[index] if len(captured) == len(lowered) else region)
        self._leaves = sorted({key for step in self._steps for key in step.sources if key[0] != "derived"})
        self._pick = pick([number for kind, number in self._leaves if kind == "argument"])
        self._rest = tuple(self._fixed[number] for kind, number in self._leaves if kind == "tensor")
        self._held: list[Tensor] = []
        leaves = self._pick(example_inputs) + self._rest
        values = {n: step.constant.detach() for n, step in enumerate(self._steps) if step.constant is not None}
        self._current = _Weights(WeightWatch(leaves), values)
        self._known = {self._current.watch.addresses: self._current}
        self._idle = threading.Condition(threading.Lock())
        self._running = 0

    def argument(self, tensor: Tensor) -> int | None:
        """The position of the argument that is ``tensor``, or None."""
        return self._arguments.get(id(tensor))

    def hold(self, tensor: Tensor) -> None:
        """Append a plain constant to those that ``enter`` returns."""
        self._held.append(tensor)
        self._current = replace(self._current, held=tuple(self._held))
        self._known = {self._current.watch.addresses: self._current}

    def enter(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Before a call with ``arguments``: bring the constants up to date; ``leave`` must follow the call."""
        leaves = self._pick(arguments) + self._rest
        with self._idle:
            if not self._current.watch.unchanged(leaves):
                self._idle.wait_for(lambda: self._running == 0)
                self._change_over(leaves)
            self._running += 1
            return self._current.held

    def leave(self) -> None:
        """After a call."""
        with self._idle:
            self._running -= 1
            if self._running == 0:
                self._idle.notify_all()

    def _change_over(self, leaves: tuple[Tensor, ...]) -> None:
        watch = WeightWatch(leaves)  # before anything is computed: what changes meanwhile is noticed by the next call
        known = self._known.get(watch.addresses)
        if known is None:
            weights = self._derive(set(self._leaves), leaves, _Weights(watch, {}))
        else:
            changed = {self._leaves[index] for index in known.watch.changed(leaves)}
            weights = self._derive(changed, leaves, replace(known, watch=watch)) if changed else known
        self._known = {at: kept for at, kept in self._known.items() if not kept.watch.freed}
        self._known[watch.addresses] = self._current = weights
        for number, value in weights.values.items():
            constant = self._steps[number].constant
            if constant is not None and constant.layout != torch.strided:
                constant.data = value

    def _derive(self, changed: set[_Key], leaves: tuple[Tensor, ...], before: _Weights) -> _Weights:
        """``before`` with everything computed again that follows from ``changed``."""
        known: dict[_Key, Tensor] = dict(zip(self._leaves, leaves, strict=True))

        def value(key: _Key) -> Tensor:
            if key not in known:
                step = self._steps[key[1]]
                known[key] = step.compute(*map(value, step.sources))
            return known[key]

        values = dict(before.values)
        for number, step in enumerate(self._steps):
            if changed.isdisjoint(step.sources):
                continue
            changed.add(("derived", number))
            if step.constant is not None:
                # Tensors made in inference mode and outside of it cannot take each other's payload.
                with torch.inference_mode(step.constant.is_inference()), torch.no_grad():
                    values[number] = value(("derived", number))
        held = tuple(
            values[self._derived[id(tensor)]] if id(tensor) in self._derived else tensor for tensor in self._held
        )
        return _Weights(before.watch, values, held)

    def _add_region(self, region: fx.GraphModule, captured: fx.GraphModule) -> None:
        """Take the derivations of a region; what it reads no longer is in the same region as it was captured."""
        numbers: dict[str, int] = {}
        for name, derived in derived_constants(region).items():
            constant = _find(region, name)
            sources = tuple(self._source(region, captured, source, numbers) for source in derived.sources)
            numbers[name] = len(self._steps)
            if constant is not None:
                self._derived[id(constant)] = len(self._steps)
            self._steps.append(_Step(sources, derived.compute, constant))

    def _source(self, region: fx.GraphModule, captured: fx.GraphModule, name: str, numbers: dict[str, int]) -> _Key:
        """Where ``name`` comes from: a derivation, an argument (of that name, or that very tensor), the graph."""
        if name in numbers:
            return "derived", numbers[name]
        tensor = _find(region, name)
        if tensor is None and name in self._bindings:
            return "argument", self._bindings[name]
        tensor = _find(captured, name) if tensor is None else tensor  # a tensor that forward makes, torch.tensor(0.5)
        if tensor is None:
            raise LowerError(f"a constant is derived from {name}, which the graph does not hold")
        if id(tensor) in self._derived:
            return "derived", self._derived[id(tensor)]
        if id(tensor) in self._arguments:
            return "argument", self._arguments[id(tensor)]
        self._fixed[id(tensor)] = tensor
        return "tensor", id(tensor)


def pick(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """``arguments -> tuple(arguments[p] for p in positions)``, at C speed."""
    if not positions:
        return lambda arguments: ()
    if len(positions) == 1:
        return lambda arguments: (arguments[positions[0]],)
    return itemgetter(*positions)


def _find(region: fx.GraphModule, name: str) -> Tensor | None:
    found: Any = region
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, Tensor) else None
