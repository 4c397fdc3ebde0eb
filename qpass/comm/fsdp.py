"""FSDP2's own seams -> parameters gathered and gradients scattered as codes: `compress_fsdp(module)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from qpass.comm import collectives
from qpass.comm.codec import Codec, codec
from qpass.comm.cost import Link, decide
from qpass.comm.statistics import Statistics, sent_bytes
from qpass.errors import ConfigError, InputError
from qpass.ops.comm import FLOATS


class FSDPCompression:
    """What `compress_fsdp` did: the modules it reached and what they have sent.

    Attributes:
        modules: the dotted names of the sharded modules whose collectives are compressed.
        statistics: bytes of this rank.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.statistics = Statistics()


def compress_fsdp(
    module: nn.Module,
    all_gather: str | Codec | None = "int8",
    reduce_scatter: str | Codec | None = "int8",
    *,
    link: Link | None = None,
    error_feedback: bool = False,
) -> FSDPCompression:
    """Compress the collectives of every FSDP2 module in `module`; call it after the last `fully_shard`.

    The shards that the optimizer updates stay as they are; what is rounded is the copy that forward and backward
    compute with, equally on all ranks, and the gradients. Everything else about FSDP2 stays as it was.

    Args:
        module: contains modules on which `torch.distributed.fsdp.fully_shard` was called.
        all_gather: codec of the parameters, or None to send them in full.
        reduce_scatter: codec of the gradients, or None.
        link: constants of `calibrate_link`; what would not be faster compressed is then sent in full.
        error_feedback: refused. What rounding took from a gradient would have to be kept for all parameters on every
            rank, in float32: the memory that sharding is there to save. And what it takes from gathered parameters
            needs none, for the shards that the optimizer updates are not rounded.

    Raises:
        ConfigError: error feedback was asked for.
        InputError: nothing in `module` is sharded.
        ValueError: torch's own, for a module whose parameters lie on several meshes.
    """
    if error_feedback:
        raise ConfigError(
            "FSDP2 has no error feedback: its residuals would need a whole float32 gradient on every rank.",
            hint="use more bits for reduce_scatter, or DDP with ddp_hook(error_feedback=True)",
        )
    done = FSDPCompression()
    for name, part in module.named_modules():
        if not isinstance(part, FSDPModule):
            continue
        done.modules.append(name)
        if all_gather is not None:
            gather: Any = CompressedAllGather(codec(all_gather), done.statistics, link)
            part.set_custom_all_gather(gather)
        if reduce_scatter is not None:
            scatter: Any = CompressedReduceScatter(codec(reduce_scatter), done.statistics, link)
            part.set_custom_reduce_scatter(scatter)
    if not done.modules:
        raise InputError(
            f"{type(module).__name__} has no module sharded by FSDP2.",
            hint="call torch.distributed.fsdp.fully_shard on it first",
        )
    return done


class _Allocate:
    """What FSDP2 asks of a custom collective beside the call; torch exports no base class for it, so types say Any."""

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An ordinary tensor: what is sent lies elsewhere."""
        return torch.empty(*size, dtype=dtype, device=device)


class CompressedAllGather(_Allocate):
    """FSDP2's all_gather, as codes. Parameters that are no floats, or no longer than their codes, go in full."""

    def __init__(self, codec: Codec, statistics: Statistics, link: Link | None = None) -> None:
        self.codec, self.statistics, self.link = codec, statistics, link

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather `input_tensor`, which may be a part of `output_tensor`."""
        numel, world = output_tensor.numel(), group.size()
        plain = sent_bytes("all_gather", numel, world, output_tensor.element_size())
        if not _pays("all_gather", output_tensor, world, self.codec, self.link):
            self.statistics.add(plain, plain)
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        payload = self.codec.payload_bytes(input_tensor.numel())
        self.statistics.add(sent_bytes("all_gather", payload * world, world, 1), plain)
        return collectives.all_gather(output_tensor, input_tensor, group=group, codec=self.codec, async_op=async_op)


class CompressedReduceScatter(_Allocate):
    """FSDP2's reduce_scatter, as codes; reductions other than SUM and AVG go in full."""

    def __init__(self, codec: Codec, statistics: Statistics, link: Link | None = None) -> None:
        self.codec, self.statistics, self.link = codec, statistics, link

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Reduce `input_tensor` over the group and keep this rank's part."""
        numel, world = input_tensor.numel(), group.size()
        plain = sent_bytes("reduce_scatter", numel, world, input_tensor.element_size())
        summed = op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
        if not summed or not _pays("reduce_scatter", input_tensor, world, self.codec, self.link):
            self.statistics.add(plain, plain)
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        payload = self.codec.payload_bytes(output_tensor.numel())
        self.statistics.add(sent_bytes("reduce_scatter", payload * world, world, 1), plain)
        return collectives.reduce_scatter(
            output_tensor, input_tensor, op=op, group=group, codec=self.codec, async_op=async_op
        )


def _pays(collective: str, whole: Tensor, world: int, how: Codec, link: Link | None) -> bool:
    if whole.dtype not in FLOATS or how.bits_per_element >= 8 * whole.element_size():
        return False
    return link is None or bool(decide(collective, whole.numel(), whole.dtype, world, how, link))
