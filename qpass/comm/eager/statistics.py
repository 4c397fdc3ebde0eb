"""Statistics: the bytes that compressed collectives have sent so far, and the error of rounding."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Counts of one rank since the hook was made or its state was loaded.

    Attributes:
        steps: finished training steps (DDP hooks only).
        bytes: sent by this rank, scales and padding included, frames of the transport not.
        plain_bytes: what float collectives of the tensors' own dtype send at best for the same.
    """

    steps: int = 0
    bytes: int = 0
    plain_bytes: int = 0
    _error: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64), repr=False)

    @property
    def megabytes(self) -> float:
        """Megabytes (1e6 bytes) sent by this rank."""
        return self.bytes / 1e6

    @property
    def ratio(self) -> float:
        """How many times fewer bytes were sent than in full; 1.0 before anything was sent."""
        return self.plain_bytes / self.bytes if self.bytes else 1.0

    @property
    def error_norm(self) -> float:
        """||decoded - value|| / ||value|| over all that was measured; nan where nothing was."""
        wrong, whole = self._error.tolist()
        return (wrong / whole) ** 0.5 if whole else float("nan")

    def add(self, sent: int, plain: int) -> None:
        """Count a collective."""
        self.bytes += sent
        self.plain_bytes += plain

    def add_error(self, value: Tensor, decoded: Tensor) -> None:
        """Count the error of one tensor; blocks that were not finite do not count. Never waits for the device."""
        wrong = (value - decoded).nan_to_num_(0.0, 0.0, 0.0).square().sum(dtype=torch.float64)
        whole = torch.where(decoded.isfinite(), value, 0.0).square().sum(dtype=torch.float64)
        self._error = self._error.to(value.device) + torch.stack((wrong, whole))


def sent_bytes(collective: str, numel: int, world: int, itemsize: float) -> int:
    """Bytes that each rank sends at best for a collective over a whole tensor of `numel` elements."""
    rounds = 2 if collective == "all_reduce" else 1
    return round(rounds * (world - 1) * numel / world * itemsize)


def plain_bytes(tensor: Tensor, world: int) -> int:
    """Bytes that each rank sends for a plain all_reduce; of a sparse one all gather all indices and values."""
    if tensor.is_sparse:
        return (world - 1) * (tensor._indices().nbytes + tensor._values().nbytes)
    return sent_bytes("all_reduce", tensor.numel(), world, tensor.element_size())
