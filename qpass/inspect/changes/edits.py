"""Instances gathered into edits ``before -> after``, one for each kind of place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from qpass.inspect.changes.change import Edit, Instance
from qpass.inspect.values.path_patterns import NUMBER, path_patterns


def edits(found: Sequence[Instance]) -> Iterator[Edit]:
    """Equal instances in one edit for each pattern of module paths, in order of appearance."""
    groups: dict[object, list[Instance]] = defaultdict(list)
    for instance in found:
        groups[NUMBER.sub("#", instance.module), instance.signature].append(instance)
    order = {id(instance): number for number, instance in enumerate(found)}
    parts = []
    for members in groups.values():
        by_path: dict[str, list[Instance]] = defaultdict(list)
        for instance in members:
            by_path[instance.module].append(instance)
        for pattern, paths in path_patterns(by_path):
            parts.append(Edit(pattern, tuple(instance for path in paths for instance in by_path[path])))
    yield from sorted(parts, key=lambda edit: order[id(edit.instances[0])])
