"""The targets by name."""

from __future__ import annotations

from types import ModuleType

from qpass.errors import ConfigError, near
from qpass.targets.x86 import linear as x86

TARGETS: dict[str, ModuleType] = {x86.NAME: x86}


def get(name: str) -> ModuleType:
    """The target of this name; :class:`ConfigError` with the nearest name otherwise."""
    if name not in TARGETS:
        raise ConfigError(f"unknown target {name!r}{near(name, TARGETS)}", hint=f"use one of {', '.join(TARGETS)}")
    return TARGETS[name]
