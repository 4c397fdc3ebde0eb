"""Override: a codec for some collectives, chosen by kind, group, module path, direction and size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from qpass.comm.policy.cost import FORMS
from qpass.comm.wire.codec import Codec, codec
from qpass.errors import ConfigError, near


@dataclass(frozen=True)
class Place:
    """The place of a collective, in terms that all ranks of its group know alike.

    ``groups`` are the names of its group: that of the process group and, where one was given, its description.
    ``modules`` are the paths of the modules around it, outermost first: none where the graph keeps none.
    """

    kind: str
    groups: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    backward: bool = False


@dataclass(frozen=True)
class Override:
    """What holds for some collectives. All conditions given must hold, and at least one must be given.

    Args:
        codec: what they send, by name or as a `Codec`; None leaves them plain.
        kind: ``"all_gather"`` and the like.
        group: a glob on the name of the process group, or on its description (of a mesh's dimension: ``"mesh_tp"``).
        module: a glob on the module path (``"layers.*.mlp"``; ``*`` also crosses dots). It holds inside the module,
            too. Compiled autograd and Inductor's buckets keep no module paths.
        backward: True for those of backward graphs, False for those of forward graphs.
        min_bytes: size of the whole tensor from which on it holds; None for the policy's own.

    Raises:
        ConfigError: no condition, or no such codec or kind.
    """

    codec: Codec | None
    kind: str | None = None
    group: str | None = None
    module: str | None = None
    backward: bool | None = None
    min_bytes: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "codec", None if self.codec is None else codec(self.codec))
        if not self.conditions:
            raise ConfigError(
                "An override names no kind, group, module, backward or min_bytes, so it would hold everywhere",
                hint="name what it is for, or change the policy's own codec",
            )
        if self.kind is not None:
            check_kind(self.kind)

    @property
    def conditions(self) -> dict[str, object]:
        """The conditions that are given, by name."""
        names = ("kind", "group", "module", "backward", "min_bytes")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def matches(self, place: Place) -> bool:
        """Whether all conditions but that of the size hold."""
        return (
            self.kind in (None, place.kind)
            and self.backward in (None, place.backward)
            and (self.group is None or any(fnmatchcase(name, self.group) for name in place.groups))
            and (self.module is None or any(fnmatchcase(path, self.module) for path in place.modules))
        )

    def __str__(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.conditions.items())


@dataclass
class OverrideMatches:
    """Which overrides of a policy match a collective of one graph, and the names that they could have meant."""

    backward: bool = False
    matched: set[int] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)
    modules: set[str] = field(default_factory=set)

    def note(self, place: Place, overrides: Iterable[Override]) -> None:
        """Add a collective: the names that an override could have meant, and the overrides whose conditions hold."""
        self.kinds.add(place.kind)
        self.groups.update(place.groups)
        self.modules.update(place.modules)
        self.matched.update(index for index, override in enumerate(overrides) if override.matches(place))

    def looked_for(self, overrides: Iterable[Override]) -> list[tuple[str, bool, str]]:
        """Each override that is meant for such a graph: its name, whether it met a collective, else a name near to it.

        The last is ``""`` where none is near. An override for the other direction is not meant for this graph.
        """
        meant = [(index, one) for index, one in enumerate(overrides) if one.backward in (None, self.backward)]
        return [
            (f"override {index} ({one})", index in self.matched, "" if index in self.matched else self._near(one))
            for index, one in meant
        ]

    def _near(self, override: Override) -> str:
        given = ((override.module, self.modules), (override.group, self.groups), (override.kind, self.kinds))
        return next((hint for name, known in given if name is not None and (hint := near(name, sorted(known)))), "")


def check_kind(kind: str) -> None:
    """Raise ConfigError where there is no such kind of collective, with a name near to it."""
    if kind not in FORMS:
        raise ConfigError(f"No collective is named {kind!r}{near(kind, FORMS)}")
