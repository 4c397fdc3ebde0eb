"""Module paths that differ in whole numbers only, written as one: ``layers.{0..2}.fc``."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole step of a dotted path


def path_patterns(paths: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Module paths grouped where only whole numbers in them differ: ``(pattern, paths)``, in order of appearance.

    ``layers.0.fc``, ``layers.1.fc``, ``layers.2.fc`` read ``layers.{0..2}.fc``. A pattern stands for exactly its
    paths: where numbers at two places do not occur in all combinations, the first place is written out.
    """
    groups: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        groups.setdefault(NUMBER.sub("#", path), []).append(path)
    for members in groups.values():
        indices = {path: tuple(map(int, NUMBER.findall(path))) for path in members}
        for block in _products(list(indices.values())):
            matching = tuple(path for path in members if indices[path] in block)
            spans = [_span(sorted(set(values))) for values in zip(*block, strict=True)]
            between = NUMBER.split(matching[0])
            yield "".join(itertools.chain(*itertools.zip_longest(between, spans, fillvalue=""))), matching


def _products(indices: list[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """``indices`` split into blocks that are full products of what occurs at each place."""
    axes = [sorted(set(values)) for values in zip(*indices, strict=True)]
    if set(itertools.product(*axes)) == set(indices) or len(indices) == 1:
        yield indices
        return
    place = next(place for place, values in enumerate(axes) if len(values) > 1)
    for value in axes[place]:
        yield from _products([index for index in indices if index[place] == value])


def _span(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"
