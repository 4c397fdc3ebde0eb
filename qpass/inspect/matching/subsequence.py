"""The longest common subsequence of two sequences of numbers, fast where most of them agree."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence

CANDIDATES = 16
"""Occurrences of one number that are tried as its partner: those nearest to where it is expected."""


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """Index pairs ``(i, j)`` with ``a[i] == b[j]``, rising in both, as many as possible.

    Equal ends are paired first, which loses nothing. Between them it is Hunt and Szymanski's method ("A fast algorithm
    for computing longest common subsequences", 1977): the longest rising chain of matching pairs. A number that occurs
    more than ``CANDIDATES`` times is tried only with its nearest occurrences, so time stays near n log n.
    """
    start, end = 0, 0
    shorter = min(len(a), len(b))
    while start < shorter and a[start] == b[start]:
        start += 1
    while end < shorter - start and a[-1 - end] == b[-1 - end]:
        end += 1
    middle = _chain(a[start : len(a) - end], b[start : len(b) - end])
    head = [(i, i) for i in range(start)]
    tail = [(len(a) - end + i, len(b) - end + i) for i in range(end)]
    return head + [(i + start, j + start) for i, j in middle] + tail


def _chain(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    places: dict[int, list[int]] = defaultdict(list)
    for j, value in enumerate(b):
        places[value].append(j)
    occurred: dict[int, int] = defaultdict(int)
    lasts: list[int] = []  # the smallest j that ends a chain of each length
    links: list[tuple[int, int, int]] = []
    at: list[int] = []
    for i, value in enumerate(a):
        candidates = places.get(value, [])
        if len(candidates) > CANDIDATES:
            middle = occurred[value]
            low = max(0, min(middle - CANDIDATES // 2, len(candidates) - CANDIDATES))
            candidates = candidates[low : low + CANDIDATES]
        occurred[value] += 1
        for j in reversed(candidates):
            length = bisect_left(lasts, j)
            links.append((i, j, at[length - 1] if length else -1))
            if length == len(lasts):
                lasts.append(j)
                at.append(len(links) - 1)
            else:
                lasts[length], at[length] = j, len(links) - 1
    chain = []
    link = at[-1] if at else -1
    while link >= 0:
        i, j, link = links[link]
        chain.append((i, j))
    return chain[::-1]
