"""How the rows of a payload are divided: equally many for each rank, or for each piece that is sent by itself.

    6 rows, 4 ranks     [0 1] [2 3] [4 5] [   ]     2 rows a rank; the last ranks may own fewer, or none

Every division of a tensor in whole rows is made here. All ranks make the same one from the same numbers, and the eager
schedules, the form that Dynamo traces and the rules of the compiler make the same one, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from qpass.comm.wire.format import WireFormat

CHUNKS = 8
"""Most pieces that a tensor is cut into: one transfer at a time leaves a link half idle, eight fill it."""

CHUNK = 1 << 18
"""Fewest elements of a piece, where there are several: below that the latency of a transfer outweighs the overlap."""


@dataclass(frozen=True)
class Partition:
    """Rows in ``parts`` shares of equally many; numbers may be symbolic.

    Args:
        rows: the rows that are divided.
        parts: the number of shares.
        wire: the format of the rows.
    """

    rows: Any
    parts: int
    wire: WireFormat

    @cached_property
    def share_rows(self) -> Any:
        """Rows of each share; those behind the last row are padding."""
        return (self.rows + (self.parts - 1)) // self.parts

    @cached_property
    def share(self) -> Any:
        """Elements of each share, padding included."""
        return self.share_rows * self.wire.row

    @property
    def numel(self) -> Any:
        """Elements of all shares, padding included."""
        return self.share * self.parts

    @property
    def share_bytes(self) -> Any:
        """Bytes of each share's payload, padding included."""
        return self.share_rows * self.wire.width

    @cached_property
    def payload_bytes(self) -> Any:
        """Bytes of the payloads of all shares, padding included."""
        return self.parts * self.share_rows * self.wire.width

    def owned(self, part: int, numel: int) -> range:
        """The elements, of `numel` that were divided, that lie in one share: less than a share at the end, or none."""
        start = min(part * self.share, numel)
        return range(start, min(start + self.share, numel))


def partition(numel: Any, world: int, wire: WireFormat) -> Partition:
    """`numel` elements in equally many whole rows for each of `world` ranks."""
    return Partition(wire.rows(numel), world, wire)


def whole_rows(numel: int, row: int) -> int:
    """`numel` rounded up to whole rows of `row` elements."""
    return -(-numel // row) * row


def pieces_of(numel: int | torch.SymInt, wire: WireFormat) -> int:
    """The number of pieces that `numel` elements are sent in: at most `CHUNKS`, none empty.

    Where there are several, each has `CHUNK` elements or more. A symbolic size is compared as a number would be, which
    guards the graph.
    """
    pieces = 1
    while pieces < CHUNKS and numel >= (pieces + 1) * CHUNK:
        pieces += 1
    if pieces == 1:
        return pieces
    share = partition(numel, pieces, wire).share
    while pieces > 1 and (pieces - 1) * share >= numel:  # so few rows that the last pieces are empty
        pieces -= 1
    return pieces


def cut(numel: Any, pieces: int, wire: WireFormat) -> list[tuple[Any, Any]]:
    """Where each piece starts and stops, all but the last whole numbers of rows; `numel` may be symbolic.

    `pieces` is what `pieces_of` gives, so that none is empty.
    """
    share = partition(numel, pieces, wire).share
    starts = [piece * share for piece in range(pieces)]
    return list(zip(starts, [*starts[1:], numel], strict=True))
