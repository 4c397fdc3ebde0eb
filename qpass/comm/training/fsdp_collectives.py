"""The collectives that FSDP2 calls instead of its own: they send codes where that is fewer bytes.

Every parameter starts a row of blocks (`padded`), so ranks that hold the same shard of the same tensor, as those of
tensor parallelism do of what they replicate, send the same codes of it and stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager import collectives
from qpass.comm.eager.schedule import two_shot_bytes
from qpass.comm.eager.statistics import Statistics, sent_bytes
from qpass.comm.policy.cost import Link, decide
from qpass.comm.training.fsdp_unit import Lies, Unit
from qpass.comm.training.ledger import DECLINED_BY_LINK, Declined, Ledger
from qpass.comm.training.padded import Padded, padded
from qpass.comm.wire.codec import Codec
from qpass.comm.wire.operators import FLOATS

Kind = dist.ReduceOp.RedOpType


class Sender:
    """Decides for one unit whether a collective goes as codes, and counts what it sends."""

    def __init__(self, unit: Unit, how: Codec, statistics: Statistics, ledger: Ledger, link: Link | None) -> None:
        self.unit, self.codec, self.statistics, self.ledger, self.link = unit, how, statistics, ledger, link

    def layout(self, collective: str, shard: Tensor, lies: Lies, world: int, op: Kind | None = None) -> Padded | None:
        """How the parameters in `shard`, this rank's part of the whole, are to lie, or None to send them plain.

        Args:
            lies: each parameter's elements in `shard`.
            op: of a reduction.
        """
        parts = 1 if collective == "all_reduce" else world
        plain = sent_bytes(collective, parts * shard.numel(), world, shard.element_size())
        why = self._declined(collective, shard, lies, world, op)
        layout = None
        if why is None:
            layout = padded(lies.sizes, self.codec.row)
            payload = self.codec.payload_bytes(layout.numel)
            if collective == "all_reduce" and world > 2:
                payload = two_shot_bytes(layout.numel, self.codec, world)
            sent = sent_bytes(collective, parts * payload, world, 1)
            self.ledger.add(self.unit.place, collective, sent, plain, str(self.codec))
        else:
            sent = plain
            self.ledger.add(self.unit.place, collective, sent, plain, why=why)
        self.statistics.add(sent, plain)
        return layout

    def _declined(self, collective: str, shard: Tensor, lies: Lies, world: int, op: Kind | None) -> Declined | None:
        if shard.dtype == torch.uint8:
            return Declined("its parameters have several dtypes, so FSDP2 gathers bytes")
        if shard.dtype not in FLOATS:
            return Declined(f"{shard.dtype} has no codes")
        if op is not None and op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            return Declined(f"{op.name} is neither a sum nor an average")
        if sum(lies.sizes) != shard.numel():
            return Declined("where its parameters lie in the buffer is not known")
        numel = sum(lies.nominal)
        rows = sum(self.codec.rows(size) for size in lies.nominal)
        if rows * self.codec.width >= numel * shard.element_size():
            return Declined("its codes would be no fewer bytes")
        whole = numel if collective == "all_reduce" else world * numel
        if self.link is not None and not decide(collective, whole, shard.dtype, world, self.codec, self.link):
            return DECLINED_BY_LINK
        return None


class _Allocate:
    """The other methods that FSDP2 asks of a custom collective. torch exports no base class, so types say Any."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An ordinary tensor: what is sent lies elsewhere."""
        return torch.empty(*size, dtype=dtype, device=device)


class CompressedAllGather(_Allocate):
    """FSDP2's all_gather, as codes."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather `input_tensor`, which may be a part of `output_tensor`."""
        world = group.size()
        layout = self.sender.layout("all_gather", input_tensor, self.sender.unit.gathered(world), world)
        if layout is None:
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        everyone = layout.empty(output_tensor)
        work = collectives.all_gather(everyone, layout.pack(input_tensor), group, self.sender.codec, async_op)
        return _unpacked(work, layout, everyone, output_tensor)


class CompressedReduceScatter(_Allocate):
    """FSDP2's reduce_scatter, as codes."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        """Reduce `input_tensor` over the group and keep this rank's part."""
        kind, lies = _kind(op), self.sender.unit.reduced()
        layout = self.sender.layout("reduce_scatter", output_tensor, lies, group.size(), kind)
        if layout is None:
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        values, own = layout.pack(input_tensor), layout.empty(output_tensor)
        work = collectives.reduce_scatter(own, values, kind, group, self.sender.codec, async_op)
        return _unpacked(work, layout, own, output_tensor)


class CompressedReplicas(dist.ProcessGroup):
    """HSDP's group of replicas, whose all_reduce goes as codes: FSDP2 has no other seam there, and calls no more of it.

    Args:
        group: the group of replicas itself.
        sender: of the unit.
    """

    def __init__(self, group: dist.ProcessGroup, sender: Sender) -> None:
        super().__init__(group.rank(), group.size())  # type: ignore[call-arg]  # the form for classes in Python
        self.group, self.sender = group, sender

    def allreduce(self, tensors: list[Tensor], options: Any) -> Any:  # type: ignore[override]
        """What ``dist.all_reduce(tensor, op, group=self)`` calls; the result is equal on all replicas."""
        (tensor,), kind, world = tensors, _kind(options.reduceOp), self.group.size()
        layout = self.sender.layout("all_reduce", tensor, self.sender.unit.reduced(), world, kind)
        if layout is None:
            return dist.all_reduce(tensor, options.reduceOp, self.group, async_op=True)
        values = layout.pack(tensor)
        shots = "one_shot" if world == 2 else "two_shot"  # never by size, which may differ by tensor-parallel rank
        collectives.all_reduce(values, kind, self.group, self.sender.codec, schedule=shots)
        layout.unpack(values, tensor)
        return None


class _Unpacking(dist.Work):
    """Waits for a call, then lays out what it brought as FSDP2 expects it."""

    def __init__(self, work: dist.Work, layout: Padded, values: Tensor, flat: Tensor) -> None:
        super().__init__()
        self._work, self._layout, self._values, self._flat = work, layout, values, flat
        self._is_done = False

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Block until the result lies in place; errors of the call are raised here."""
        self._work.wait()
        if not self._is_done:
            self._is_done = True
            self._layout.unpack(self._values, self._flat)
        return True


def _kind(op: Any) -> Kind:
    """The kind of an operator, which may be torch's object around it: that equals its kind from the left only."""
    return next(kind for kind in Kind.__members__.values() if op == kind)


def _unpacked(work: dist.Work | None, layout: Padded, values: Tensor, flat: Tensor) -> dist.Work | None:
    """The work that ends with the result in `flat`; None where it is there, as after a synchronous call."""
    if work is not None and not layout.is_dense:
        return _Unpacking(work, layout, values, flat)
    if work is None:
        layout.unpack(values, flat)
    return work
