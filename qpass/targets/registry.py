"""The targets by name and by device: qpass's own, and those of other packages."""

from __future__ import annotations

from functools import lru_cache
from importlib.metadata import entry_points

from torch import fx

from qpass.errors import ConfigError, near
from qpass.targets.target import Target
from qpass.targets.x86.target import X86

AUTO = "auto"
"""The target of the device that a model is on."""

ENTRY_POINTS = "qpass.targets"
"""The group of entry points under which a package offers a `Target`."""

_given: dict[str, Target] = {}


@lru_cache(maxsize=1)
def _installed() -> dict[str, Target]:
    """qpass's own targets, and those that installed packages offer.

    Raises:
        ConfigError: an entry point is no target, or has the name of another.
    """
    found = {X86.name: X86}
    for entry in entry_points(group=ENTRY_POINTS):
        target = entry.load()
        if not isinstance(target, Target):
            raise ConfigError(
                f"the entry point {entry.name!r} of {ENTRY_POINTS} is {type(target).__name__}, not a Target",
                where=entry.value, hint="let it name a qpass.targets.Target",
            )  # fmt: skip
        if target.name in found:
            raise ConfigError(f"two targets are named {target.name!r}", where=entry.value, hint="rename one of them")
        found[target.name] = target
    return found


def get(wanted: str | Target) -> Target:
    """The target of this name, or the target itself, which is then known by its name in this process.

    Raises:
        ConfigError: no target has this name, with the nearest one; or another target has the name of the given one.
    """
    if isinstance(wanted, Target):
        if _installed().get(wanted.name, wanted) is not wanted:
            raise ConfigError(
                f"a target named {wanted.name!r} is installed already", hint='give yours a name of its own: name="..."'
            )
        _given[wanted.name] = wanted
        return wanted
    known = _installed() | _given
    if wanted not in known:
        raise ConfigError(f"unknown target {wanted!r}{near(wanted, known)}", hint=f"use one of {', '.join(known)}")
    return known[wanted]


def for_graph(gm: fx.GraphModule, wanted: str | Target) -> Target:
    """The target that is ``wanted``; "auto" is the one that serves the device of the parameters and buffers of ``gm``.

    Raises:
        ConfigError: as `get` and `for_device`; or the parameters are on several kinds of devices.
    """
    if wanted != AUTO:
        return get(wanted)
    devices = sorted({tensor.device.type for tensor in (*gm.parameters(), *gm.buffers())})
    if len(devices) > 1:
        raise ConfigError(
            f"the model's parameters are on several kinds of devices: {', '.join(devices)}",
            hint='move them to one, or name the target: target="..."',
        )
    return for_device(devices[0] if devices else "cpu")


def for_device(device: str) -> Target:
    """The first target that serves devices of this type.

    Raises:
        ConfigError: there is none.
    """
    known = _installed() | _given
    found = next((target for target in known.values() if target.device == device), None)
    if found is None:
        served = ", ".join(f"{target.device} ({name})" for name, target in known.items())
        raise ConfigError(
            f"the model's parameters are on {device!r}, and no target serves that device",
            hint=f"move the model to a device that is served: {served}",
        )
    return found
