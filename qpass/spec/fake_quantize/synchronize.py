"""Statistics over all processes of a group, so that every rank quantizes alike."""

from __future__ import annotations

import warnings
from typing import TypeVar

from torch import nn

from qpass import torch_private
from qpass.errors import ConfigError
from qpass.spec.observers import ObserverBase

Module = TypeVar("Module", bound=nn.Module)


def synchronize(module: Module, process_group: object = None) -> Module:
    """Let every observer inside `module` see the tensors of all ranks: qparams are those of one process on the union.

    For data-parallel training: ``DistributedDataParallel(synchronize(model))``. From now on a forward pass that
    observes holds one small collective for each observer (a histogram two), so all ranks of the group must run the same
    forwards, as with ``SyncBatchNorm``; a rank whose batch is empty takes part. ``eval()`` ends that.

    Args:
        process_group: a group, or None for all processes.

    Returns:
        `module`, changed.

    Raises:
        ConfigError: ``torch.distributed`` has no process group yet.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        raise ConfigError(
            "synchronize needs a process group, and there is none",
            hint="call torch.distributed.init_process_group first; a single process needs no synchronize",
        )
    group = distributed.group.WORLD if process_group is None else process_group
    for part in module.modules():
        if isinstance(part, ObserverBase):
            part.process_group = group.group_name  # type: ignore[attr-defined]
    return module


@torch_private.assume_constant_result
def warn_of_unsynchronized() -> None:
    """Say, once, that statistics are gathered on this rank alone although there are others; while tracing, too."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        warnings.warn(
            "Fake-quantize modules observe on each rank alone, so ranks will quantize differently. For data-parallel "
            "training: DistributedDataParallel(qpass.spec.fake_quantize.synchronize(model)).",
            stacklevel=2,
        )
