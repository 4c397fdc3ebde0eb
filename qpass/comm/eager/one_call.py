"""One call of a collective: its checks, its agreement with the other ranks, its schedule; here or on a thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from qpass.comm.eager import schedule
from qpass.comm.eager.agreement import Header, agree, refuse
from qpass.comm.eager.group import Group, group_of
from qpass.comm.eager.work import Work
from qpass.comm.policy.cost import Link, decide
from qpass.comm.wire.codec import Codec
from qpass.comm.wire.codec import codec as codec_of
from qpass.comm.wire.operators import FLOATS
from qpass.errors import InputError, QpassError

AnyGroup = dist.ProcessGroup | DeviceMesh | None

UNEVEN_PIECES = 4
"""Pieces of an all_to_all with split sizes: a constant, since no rank knows the sizes of what the others exchange."""

_OPS = {"sum": dist.ReduceOp.SUM, "avg": dist.ReduceOp.AVG}


class OneCall:
    """A call of the collective `name`. As a context, it tells the other ranks where a check refuses the call."""

    def __init__(
        self,
        name: str,
        group: AnyGroup,
        codec: str | Codec,
        async_op: bool,
        seed: int | None,
        link: Link | None = None,
    ) -> None:
        self.name = name
        self.across: Group | None = None
        if isinstance(group, DeviceMesh):
            if name != "all_reduce" or group.ndim != 2:
                raise InputError(
                    f"{name} takes a process group, not a mesh of {group.ndim} dimensions",
                    hint="give all_reduce a mesh of two dimensions, and other collectives one of its groups",
                )
            self.across = group_of(group.get_group(0))
            self.group = group_of(group.get_group(1))
        else:
            self.group = group_of(group)
        self.codec_name = codec
        self.async_op = async_op
        self.seed = seed
        self.link = link
        self.world = self.group.world
        self.op: Any = None

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, QpassError):
            refuse(self.group, error)

    def takes_op(self, op: Any) -> bool:
        """Whether to divide by the number of ranks."""
        self.op = _OPS.get(op, op) if isinstance(op, str) else op
        if self.op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise InputError(f"{self.name} can sum and average, not {op}", hint='use op="sum" or op="avg"')
        return bool(self.op == dist.ReduceOp.AVG)

    def takes(self, *tensors: Tensor) -> None:
        self.codec = codec_of(self.codec_name)
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                raise InputError(f"{self.name} takes tensors, not {type(tensor).__name__}")
        first, *others = tensors
        for other in others:
            if other.dtype != first.dtype or other.device != first.device:
                raise InputError(
                    f"{self.name}: output is {first.dtype} on {first.device}, input is {other.dtype} on {other.device}"
                )

    def holds(self, large: Tensor, times: int, small: Tensor, large_name: str, small_name: str) -> None:
        if large.numel() != times * small.numel():
            raise InputError(
                f"{self.name}: {large_name} has {large.numel()} elements, "
                f"not {times} times the {small.numel()} of {small_name}"
            )

    def splits(self, tensor: Tensor, splits: Sequence[int] | None, name: str) -> list[int]:
        """Elements for each rank."""
        length = tensor.shape[0] if tensor.dim() else 0
        if splits is None:
            if length % self.world:
                raise InputError(
                    f"{self.name}: the {length} indices of {name} cannot be cut into {self.world} even parts"
                )
            splits = [length // self.world] * self.world
        if len(splits) != self.world or sum(splits) != length or min(splits) < 0:
            raise InputError(
                f"{self.name}: the {name} splits {list(splits)} do not cut {length} indices for {self.world} ranks"
            )
        return [split * math.prod(tensor.shape[1:]) for split in splits]

    def all_reduce(self, x: Tensor, divides: bool, how: str) -> Any:
        if self.across is not None:
            return self._hierarchical(x, divides)
        if how == "auto":
            how = schedule.shots(x.numel(), self.codec, self.world)
        shot = schedule.all_reduce_one_shot if how == "one_shot" else schedule.all_reduce_two_shot
        divisor = self.world if divides else 1
        return self._start(
            x, (), x.numel(), how,
            lambda flat, group, seed: shot(flat, self.codec, divisor, seed, group),
            lambda: dist.all_reduce(x, self.op, self.group.process_group, self.async_op),
            declined=self._declined(x.numel(), x),
        )  # fmt: skip

    def _hierarchical(self, x: Tensor, divides: bool) -> Any:
        across = self.across
        assert across is not None
        divisor = self.world * across.world if divides else 1
        outer = across.process_group if not self.async_op else None
        declined = self._declined(-(-x.numel() // self.world), x, across.world)
        self._agree(across, x, x.numel(), "plain" if declined else "hierarchical")

        def job(flat: Tensor, group: dist.ProcessGroup, seed: int) -> None:
            schedule.all_reduce_hierarchical(
                flat, self.codec, codec_of("fp32"), divisor, seed, outer or across.twin(), group
            )

        def plain() -> Any:
            dist.all_reduce(x, self.op, self.group.process_group)
            return dist.all_reduce(x, self.op, across.process_group, self.async_op)

        if self.async_op:
            across.twin()
        alone = across.world * self.world == 1
        return self._start(x, (), x.numel(), "hierarchical", job, plain, alone=alone, declined=declined)

    def reduce_scatter(self, output: Tensor, x: Tensor, divides: bool) -> Any:
        divisor = self.world if divides else 1
        return self._start(
            output, (x,), output.numel(), "",
            lambda flat, group, seed, source: schedule.reduce_scatter(flat, source, self.codec, divisor, seed, group),
            lambda: dist.reduce_scatter_single(output, x, self.op, self.group.process_group, self.async_op),
            declined=self._declined(x.numel(), x),
        )  # fmt: skip

    def all_gather(self, output: Tensor, x: Tensor) -> Any:
        return self._start(
            output, (x,), x.numel(), "",
            lambda flat, group, seed, source: schedule.all_gather(flat, source, self.codec, seed, group),
            lambda: dist.all_gather_single(output, x, self.group.process_group, self.async_op),
            declined=self._declined(output.numel(), x),
        )  # fmt: skip

    def all_to_all(
        self, output: Tensor, x: Tensor, outputs: Any, inputs: Any, receives: list[int], sends: list[int]
    ) -> Any:
        even = outputs is None and inputs is None  # then all ranks know all sizes, else only those of their own parts
        pieces = len(schedule.chunks(x.numel(), self.codec)) if even else UNEVEN_PIECES
        return self._start(
            output, (x,), x.numel() if even else -1, "even" if even else "uneven",
            lambda flat, group, seed, source: schedule.all_to_all(
                flat, source, receives, sends, pieces, self.codec, seed, group
            ),
            lambda: dist.all_to_all_single(output, x, outputs, inputs, self.group.process_group, self.async_op),
            splits={"sends": sends, "receives": receives},
            declined=even and self._declined(x.numel(), x),
        )  # fmt: skip

    def broadcast(self, x: Tensor, src: int) -> Any:
        return self._start(
            x, (), x.numel(), f"from rank {src}",
            lambda flat, group, seed: schedule.broadcast(flat, src, self.codec, seed, group),
            lambda: dist.broadcast(x, group=self.group.process_group, group_src=src, async_op=self.async_op),
            declined=self._declined(x.numel(), x),
        )  # fmt: skip

    def _declined(self, whole: int, x: Tensor, world: int | None = None) -> bool:
        """Whether the cost model would send the tensor of `whole` elements in full; other dtypes are anyway."""
        if self.link is None or x.dtype not in FLOATS:
            return False
        return not decide(self.name, whole, x.dtype, world or self.world, self.codec, self.link)

    def _agree(self, group: Group, x: Tensor, numel: int, how: str, **splits: Any) -> None:
        op = {dist.ReduceOp.SUM: "sum", dist.ReduceOp.AVG: "avg"}.get(self.op, "")
        header = Header(self.name, str(self.codec), numel, str(x.dtype), op, how, self.async_op)
        agree(group, header, **splits)

    def _start(
        self,
        result: Tensor,
        sources: tuple[Tensor, ...],
        numel: int,
        how: str,
        job: Callable[..., None],
        plain: Callable[[], Any],
        *,
        alone: bool | None = None,
        splits: dict[str, Any] | None = None,
        declined: bool = False,
    ) -> Any:
        if self.world > 1:
            self._agree(self.group, result, numel, "plain" if declined else how, **(splits or {}))
        if declined or result.dtype not in FLOATS or (self.world == 1 if alone is None else alone):
            return plain()
        group = self.group.twin() if self.async_op else self.group.process_group
        seed = self.group.calls if self.seed is None else self.seed

        def run() -> None:
            flat = result.detach().reshape(-1)  # a view where it can be one
            try:
                job(flat, group, seed, *(source.detach().reshape(-1) for source in sources))
            except RuntimeError as error:
                raise type(error)(f"qpass.comm.{self.name} on group {self.group.name!r}: {error}") from error
            if flat.data_ptr() != result.data_ptr():
                result.copy_(flat.view(result.shape))

        if self.async_op:
            return Work(self.group, run, result)
        with torch.no_grad():
            run()
        return None
