"""Constants that are derived from weights, computed again when a weight changes.

A lowered graph reads ``packed = pack(codes)`` and ``scale = f(weight)``: constants that some pass derived from others
(:class:`~qpass.backend.derivation.Derivation`). Here they follow the weights that each call brings.

Dynamo runs one compiled graph for all models of one kind, for the layers of a transformer say, with the weights of
each in turn. So the derived constants are kept once per set of weights, and changing over costs next to nothing. They
are kept as long as all of these weights are alive, and share what follows from weights that two sets have in common.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from operator import eq, itemgetter
from typing import Any

import torch
from torch import Tensor

from qpass.backend.derivation import Derivation, Key
from qpass.backend.weight_state import WeightState
from qpass.torch_private import FakeTensor

MOST_SETS = 1024
"""Sets of living weights whose constants are kept; the one that was computed first makes room."""


@dataclass(frozen=True)
class _Weights:
    """One set of weights and what follows from them: a packed payload or a plain tensor per step that is read."""

    watch: WeightState
    values: dict[int, Tensor]
    held: tuple[Tensor, ...] = ()


class LiveConstants:
    """The constants of a lowered graph, in step with the weights they follow from.

    Packed constants are held by the compiled code and get another payload. Plain ones are arguments of the compiled
    code: ``enter`` returns them, in the order in which ``hold`` was called. Calls with the same weights may run at
    the same time; a call with other weights waits for them to end.

    ``gathered`` are the positions of arguments whose values may change in every call unnoticed. What is derived from
    them is computed in every call, and kept for that call alone.
    """

    def __init__(self, derivation: Derivation, arguments: Sequence[Any], gathered: Collection[int] = ()) -> None:
        self._steps, self._tensors = tuple(derivation.steps), tuple(derivation.tensors)
        self._leaves = sorted({key for step in self._steps for key in step.sources if key[0] != "derived"})
        self._pick = pick([number for kind, number in self._leaves if kind == "argument"])
        self._rest = tuple(self._tensors[number] for kind, number in self._leaves if kind == "tensor")
        self._gathered = {key for key in self._leaves if key[0] == "argument" and key[1] in gathered}
        self._held: list[Key] = []
        leaves = self._pick(arguments) + self._rest
        values = {n: step.constant.detach() for n, step in enumerate(self._steps) if step.constant is not None}
        values = {n: _apart(value, leaves) for n, value in values.items()}
        self._current = _Weights(WeightState(leaves), values)
        self._known = {} if self._gathered else {self._current.watch.addresses: self._current}
        self._idle = threading.Condition(threading.Lock())
        self._running = 0

    def hold(self, key: Key) -> Tensor:
        """Append a plain constant to those that ``enter`` returns; its value for the weights of this moment."""
        self._held.append(key)
        self._current = self._with_held(self._current)
        if not self._gathered:
            self._known = {self._current.watch.addresses: self._current}
        return self._current.held[-1]

    def enter(self, arguments: Sequence[Any]) -> tuple[Tensor, ...]:
        """Before a call with ``arguments``: bring the constants up to date; ``leave`` must follow the call."""
        leaves = self._pick(arguments) + self._rest
        with self._idle:
            if self._gathered or not self._current.watch.unchanged(leaves):
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
        if any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return  # a compiler asks for the form of the results; no value is read
        watch = WeightState(leaves)  # before anything is computed: what changes meanwhile is noticed by the next call
        if self._gathered:
            weights = self._derive(set(self._leaves), leaves, _Weights(watch, {}))
        else:
            weights = self._set_of(watch, leaves)
        self._current = weights
        for number, value in weights.values.items():
            constant = self._steps[number].constant
            if constant is not None and constant.layout != torch.strided:
                constant.data = value

    def _set_of(self, watch: WeightState, leaves: tuple[Tensor, ...]) -> _Weights:
        """The set with these leaves: a known one, or a new one that shares what it can with the most similar one."""
        weights = self._known.get(watch.addresses)
        if weights is None:
            alike = max(self._known.values(), key=lambda known: sum(map(eq, known.watch.addresses, watch.addresses)))
        else:
            alike = weights
        changed = {self._leaves[index] for index in alike.watch.changed(leaves)}
        if weights is None or changed:
            weights = self._derive(changed, leaves, replace(alike, watch=watch))
        self._known = {at: kept for at, kept in self._known.items() if not kept.watch.freed}
        self._known[watch.addresses] = weights
        if len(self._known) > MOST_SETS:
            del self._known[next(iter(self._known))]
        return weights

    def _derive(self, changed: set[Key], leaves: tuple[Tensor, ...], before: _Weights) -> _Weights:
        """``before`` with everything computed again that follows from ``changed``."""
        known: dict[Key, Tensor] = dict(zip(self._leaves, leaves, strict=True))

        def value(key: Key) -> Tensor:
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
                    values[number] = _apart(value(("derived", number)), leaves)
        return self._with_held(_Weights(before.watch, values))

    def _with_held(self, weights: _Weights) -> _Weights:
        held = tuple(
            weights.values[number] if kind == "derived" else self._tensors[number] for kind, number in self._held
        )
        return replace(weights, held=held)


def _apart(value: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """``value`` in memory of its own: a view of a weight would keep the weight alive as long as the compiled code."""
    if value.layout != torch.strided or not value.numel():
        return value
    address = value.untyped_storage().data_ptr()
    shared = any(address == leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.layout == torch.strided)
    return value.clone() if shared else value


def pick(positions: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """``arguments -> tuple(arguments[p] for p in positions)``, at C speed."""
    if not positions:
        return lambda arguments: ()
    if len(positions) == 1:
        return lambda arguments: (arguments[positions[0]],)
    return itemgetter(*positions)
