"""compress_fsdp(module): FSDP2 gathers parameters and reduces gradients as codes, by its own setters."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from qpass.comm.eager.statistics import Statistics
from qpass.comm.policy.cost import Link
from qpass.comm.training.fsdp_collectives import (
    CompressedAllGather,
    CompressedReduceScatter,
    CompressedReplicas,
    Sender,
)
from qpass.comm.training.fsdp_unit import Unit, replica_group
from qpass.comm.training.ledger import Entry, Ledger
from qpass.comm.wire.codec import Codec, codec
from qpass.errors import ConfigError, InputError

AS_REDUCE_SCATTER = "as reduce_scatter"


class FSDPCompression:
    """The result of `compress_fsdp`: the modules that it reached and what they have sent. ``qpass.report`` takes it.

    Attributes:
        modules: the dotted names of the sharded modules whose collectives are compressed.
        statistics: bytes of this rank.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []
        self.statistics = Statistics()
        self.ledger = Ledger()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What this rank has sent for each unit and collective, and why if not as codes."""
        return self.ledger.entries


def compress_fsdp(
    module: nn.Module,
    all_gather: str | Codec | None = "int8",
    reduce_scatter: str | Codec | None = "int8",
    *,
    all_reduce: str | Codec | None = AS_REDUCE_SCATTER,
    link: Link | None = None,
    error_feedback: bool = False,
) -> FSDPCompression:
    """Compress the collectives of every FSDP2 module in `module`; call it after the last `fully_shard`.

    The shards that the optimizer updates stay as they are; what is rounded is the copy that forward and backward
    compute with, equally on all ranks, and the gradients. Everything else about FSDP2 stays as it was. Each parameter
    starts a row of blocks, so what tensor-parallel ranks replicate stays equal on them bit for bit.

    A unit whose codes would be no fewer bytes, whose parameters have several dtypes, or whose reduction is neither a
    sum nor an average is sent in full: ``qpass.report`` of the result says so.

    Args:
        module: contains modules on which `torch.distributed.fsdp.fully_shard` was called.
        all_gather: codec of the parameters, or None to send them in full.
        reduce_scatter: codec of the gradients, or None.
        all_reduce: codec of the gradients between the replicas of HSDP, or None; the default is `reduce_scatter`'s.
        link: constants of `calibrate_link`; what would not be faster compressed is then sent in full.
        error_feedback: refused. What rounding took from a gradient would have to be kept for all parameters on every
            rank, in float32: the memory that sharding is there to save. And what it takes from gathered parameters
            needs none, for the shards that the optimizer updates are not rounded.

    Raises:
        ConfigError: error feedback was asked for, or there is no such codec.
        InputError: nothing in `module` is sharded.
    """
    from torch.distributed.fsdp import FSDPModule  # imports Dynamo

    if error_feedback:
        raise ConfigError(
            "FSDP2 has no error feedback: its residuals would need a whole float32 gradient on every rank",
            hint="use more bits for reduce_scatter, or DDP with ddp_hook(error_feedback=True)",
        )
    between = reduce_scatter if all_reduce == AS_REDUCE_SCATTER else all_reduce
    chosen = [None if name is None else codec(name) for name in (all_gather, reduce_scatter, between)]
    done, seen = FSDPCompression(), set[int]()
    for name, part in module.named_modules():
        if not isinstance(part, FSDPModule):
            continue
        done.modules.append(name)
        groups: list[Any] = part._get_fsdp_state()._fsdp_param_groups
        for number, group in enumerate(groups):
            if id(group) not in seen:  # modules that were sharded together share theirs
                seen.add(id(group))
                place = (name or "(root)") + (f" [{number}]" if len(groups) > 1 else "")
                _compress(group, place, chosen, done, link)
    if not done.modules:
        raise InputError(
            f"{type(module).__name__} has no module sharded by FSDP2",
            hint="call torch.distributed.fsdp.fully_shard on it first",
        )
    return done


def _compress(group: Any, place: str, chosen: list[Codec | None], done: FSDPCompression, link: Link | None) -> None:
    """Give one parameter group its collectives. torch's setters do this too, but only where a module has one group."""
    unit = Unit(group, place)
    gather, scatter, between = (
        None if how is None else Sender(unit, how, done.statistics, done.ledger, link) for how in chosen
    )
    if gather is not None:
        group._all_gather_comm = CompressedAllGather(gather)
    if scatter is not None:
        group._reduce_scatter_comm = CompressedReduceScatter(scatter)
    replicas = replica_group(group)
    if replicas is not None and between is not None:
        group.mesh_info = copy.copy(group.mesh_info)  # groups may share theirs
        inner = replicas.group if isinstance(replicas, CompressedReplicas) else replicas
        group.mesh_info.replicate_process_group = CompressedReplicas(inner, between)
