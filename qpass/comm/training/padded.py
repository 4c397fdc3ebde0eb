"""Tensors that lie one behind the other in a flat buffer -> the same, each starting a row of blocks.

    [a a a a a b b c c c]    ->    [a a a a a 0 0 0 | b b 0 0 0 0 0 0 | c c c 0 0 0 0 0]

A block of the flat buffer may hold the end of one tensor and the start of the next, whose values then share a scale.
The codes of a tensor that ranks hold alike would so depend on its neighbours, which the ranks may hold shards of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from qpass import torch_private
from qpass.comm.wire.partition import whole_rows


@dataclass(frozen=True)
class Padded:
    """How tensors of `sizes` elements lie, each from a row of `row` elements on."""

    sizes: tuple[int, ...]
    row: int

    @cached_property
    def padded(self) -> tuple[int, ...]:
        """The elements of whole rows that each tensor takes; the last needs no padding, for nothing follows it."""
        ends = [whole_rows(size, self.row) for size in self.sizes[:-1]]
        return (*ends, *self.sizes[-1:])

    @cached_property
    def numel(self) -> int:
        """Elements of the padded buffer."""
        return sum(self.padded)

    @property
    def is_dense(self) -> bool:
        """Whether the flat buffer is the padded one already."""
        return self.sizes == self.padded

    def empty(self, flat: Tensor) -> Tensor:
        """A padded buffer for each of the buffers one behind the other in `flat`; `flat` itself where it is dense."""
        if self.is_dense:
            return flat
        return flat.new_empty(flat.numel() // sum(self.sizes) * self.numel)

    def pack(self, flat: Tensor) -> Tensor:
        """``[copies * sum(sizes)] -> [copies * numel]``, with zeros between the tensors; `flat` itself where dense."""
        if self.is_dense:
            return flat
        values = self.empty(flat).zero_()
        torch_private.foreach_copy_(self._parts(values, self.padded), self._parts(flat, self.sizes))
        return values

    def unpack(self, values: Tensor, flat: Tensor) -> None:
        """The inverse of `pack`, into `flat`."""
        if not self.is_dense:
            torch_private.foreach_copy_(self._parts(flat, self.sizes), self._parts(values, self.padded))

    def _parts(self, buffer: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Each tensor's elements in a buffer where the tensors take `lengths`, ``[copies, size]``."""
        parts = buffer.view(-1, sum(lengths)).split(list(lengths), 1)
        return [part[:, :size] for part, size in zip(parts, self.sizes, strict=True)]


@lru_cache(maxsize=1 << 10)
def padded(sizes: tuple[int, ...], row: int) -> Padded:
    """The `Padded` of these sizes; most are asked for again at every step."""
    return Padded(sizes, row)
