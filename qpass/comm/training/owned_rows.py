"""A two-shot average with feedback: each rank remembers what rounding took from the sums that it owns.

From 3 ranks on a sum is rounded a second time, by the rank that owns it, on its way back to all. Only that rank knows
the exact sum, so it keeps the residual and adds it to the next step's sum. Row j of parameter k belongs to rank
``(j + k) mod W``, however DDP groups parameters into buckets; residuals therefore stay with their ranks.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager import schedule
from qpass.comm.eager.agreement import Header, agree
from qpass.comm.eager.group import group_of
from qpass.comm.eager.work import Work
from qpass.comm.wire.codec import Codec


class OwnedRows:
    """Who owns which rows of a bucket, and this rank's residuals.

    Args:
        rows: for each parameter of the bucket, how many rows it has.
        numbers: the parameters' numbers, equal on all ranks.
        group: of the ranks that own them.
        codec: its rows are meant.
        device: of the bucket.

    Attributes:
        residual: float32 ``[length, row]``, this rank's rows and zeros behind them.
        parts: for each parameter, the slice of `residual` that is its.
        before: the residual before the last average, where that was to be kept.
    """

    def __init__(
        self, rows: list[int], numbers: list[int], group: dist.ProcessGroup, codec: Codec, device: torch.device
    ) -> None:
        self.codec = codec
        world, rank, total = group.size(), group.rank(), sum(rows)
        owned: list[list[Tensor]] = [[] for _ in range(world)]
        self.parts: list[slice] = []
        first = mine = 0
        for count, number in zip(rows, numbers, strict=True):
            for owner in range(world):
                found = torch.arange(first, first + count)[(owner - number) % world :: world]
                owned[owner].append(found)
                if owner == rank:
                    self.parts.append(slice(mine, mine + len(found)))
                    mine += len(found)
            first += count
        lists = [torch.cat(found) for found in owned]
        self.length = max(map(len, lists))
        order = torch.full((world, self.length), total)  # the row of zeros that is put behind the bucket's
        for owner, found in enumerate(lists):
            order[owner, : len(found)] = found
        self.order = order.flatten().to(device)
        self.places = torch.argsort(self.order, stable=True)[:total]
        self.residual = torch.zeros(self.length, codec.row, device=device)
        self.before: Tensor | None = None

    def average(self, values: Tensor, group: dist.ProcessGroup, unit: float = 1.0, keep: bool = False) -> Work:
        """Start to replace `values`, float32 ``[rows * row]``, by their average over the group; equal on all ranks.

        A row that is zero on all ranks stays zero: nobody may apply it, so its residual waits. `unit` is the loss
        scale, by which the residual is smaller than the values; `keep` fills `before`.
        """
        members = group_of(group)
        agree(members, Header("all_reduce", str(self.codec), values.numel(), str(values.dtype), "avg", "owned", True))
        twin, seed = members.twin(), members.calls

        def job() -> None:
            rows = values.view(-1, self.codec.row)
            sent = torch.cat([rows, rows.new_zeros(1, self.codec.row)])[self.order].view(-1)
            total = torch.empty_like(self.residual)
            schedule.reduce_scatter(total.view(-1), sent, self.codec, members.world, seed, twin)
            self.before = self.residual.clone() if keep else None
            is_fed = total.any(1, keepdim=True)
            total += torch.where(is_fed, self.residual * unit, 0.0)
            schedule.all_gather(sent, total.view(-1), self.codec, seed, twin)
            decoded = sent.view(members.world, self.length, -1)[members.rank]
            was_sent = decoded.isfinite() & is_fed
            torch.where(was_sent, (total - decoded) / unit, self.residual, out=self.residual)
            torch.index_select(sent.view(-1, self.codec.row), 0, self.places, out=rows)

        return Work(members, job, values)
