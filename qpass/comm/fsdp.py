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
from qpass.comm.statistics import Statistics, sent_bytes
from qpass.errors import InputError
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
    module: nn.Module, all_gather: str | Codec | None = "int8", reduce_scatter: str | Codec | None = "int8"
) -> FSDPCompression:
    """Compress the collectives of every FSDP2 module in `module`; call it after the last `fully_shard`.

    The shards that the optimizer updates stay as they are; what is rounded is the copy that forward and backward
    compute with, equally on all ranks, and the gradients. Everything else about FSDP2 stays as it was.

    Args:
        module: contains modules on which `torch.distributed.fsdp.fully_shard` was called.
        all_gather: codec of the parameters, or None to send them in full.
        reduce_scatter: codec of the gradients, or None.

    Raises:
        InputError: nothing in `module` is sharded.
        ValueError: torch's own, for a module whose parameters lie on several meshes.
    """
    done = FSDPCompression()
    for name, part in module.named_modules():
        if not isinstance(part, FSDPModule):
            continue
        done.modules.append(name)
        if all_gather is not None:
            gather: Any = CompressedAllGather(codec(all_gather), done.statistics)
            part.set_custom_all_gather(gather)
        if reduce_scatter is not None:
            scatter: Any = CompressedReduceScatter(codec(reduce_scatter), done.statistics)
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

    def __init__(self, codec: Codec, statistics: Statistics) -> None:
        self.codec, self.statistics = codec, statistics

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        """Gather `input_tensor`, which may be a part of `output_tensor`."""
        numel, world = output_tensor.numel(), group.size()
        plain = sent_bytes("all_gather", numel, world, output_tensor.element_size())
        if not _compressible(output_tensor, self.codec):
            self.statistics.add(plain, plain)
            return dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        payload = self.codec.payload_bytes(input_tensor.numel())
        self.statistics.add(sent_bytes("all_gather", payload * world, world, 1), plain)
        return collectives.all_gather(output_tensor, input_tensor, group=group, codec=self.codec, async_op=async_op)


class CompressedReduceScatter(_Allocate):
    """FSDP2's reduce_scatter, as codes; reductions other than SUM and AVG go in full."""

    def __init__(self, codec: Codec, statistics: Statistics) -> None:
        self.codec, self.statistics = codec, statistics

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
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG) or not _compressible(input_tensor, self.codec):
            self.statistics.add(plain, plain)
            return dist.reduce_scatter_single(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        payload = self.codec.payload_bytes(output_tensor.numel())
        self.statistics.add(sent_bytes("reduce_scatter", payload * world, world, 1), plain)
        return collectives.reduce_scatter(
            output_tensor, input_tensor, op=op, group=group, codec=self.codec, async_op=async_op
        )


def _compressible(tensor: Tensor, how: Codec) -> bool:
    return tensor.dtype in FLOATS and how.bits_per_element < 8 * tensor.element_size()
