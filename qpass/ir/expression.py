"""Expressions: what a pattern function builds when it is called with captures instead of tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from qpass import torch_private


@dataclass(frozen=True, eq=False)
class Var:
    """A capture: binds whatever stands in its place; the same capture twice must bind the same thing."""

    name: str


@dataclass(frozen=True, eq=False)
class Expr:
    """An operator applied to captures, literals and other expressions."""

    op: torch_private.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class operators:
    """Operators as expression builders: ``aten.linear(x, w, b)``, ``aten.add.Tensor(x, y)``."""

    def __init__(self, namespace: str) -> None:
        self._namespace = getattr(torch.ops, namespace)

    def __getattr__(self, name: str) -> Any:
        return _Builder(getattr(self._namespace, name))


class _Builder:
    def __init__(self, packet: Any) -> None:
        self._packet = packet

    def __call__(self, *args: Any, **kwargs: Any) -> Expr:
        return Expr(self._packet.default, args, kwargs)

    def __getattr__(self, overload: str) -> Callable[..., Expr]:
        op = getattr(self._packet, overload)
        return lambda *args, **kwargs: Expr(op, args, kwargs)


aten = operators("aten")


def build(pattern: Callable[..., Expr | Iterable[Expr]]) -> tuple[Expr, ...]:
    """The alternatives that a pattern function stands for; its parameter names become the captures."""
    names = [name for name in inspect.signature(pattern).parameters if name != "self"]
    built = pattern(*(Var(name) for name in names))
    return (built,) if isinstance(built, Expr) else tuple(built)
