"""A unit of FSDP2: where its parameters lie in the flat buffers that it gathers and reduces.

torch gives a custom collective the buffers alone, so this reads from the unit what torch's own public setters read.
Which parameters have a gradient, and so a place in the buffer, is known at the start of `post_backward` only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Lies:
    """How the parameters' shards follow each other in a flat buffer.

    Attributes:
        sizes: the elements of each, on this rank.
        nominal: the same as all ranks know it that hold the same tensors. A tensor-parallel rank may hold more of a
            parameter than another; where that let one of them compress and the other not, the parameters that both
            hold would go apart.
    """

    sizes: tuple[int, ...]
    nominal: tuple[int, ...]


class Unit:
    """The parameter group of torch that communicates as one, and its name.

    Args:
        group: torch's `FSDPParamGroup`. From now on its `post_backward` notes which parameters have gradients.
        place: the path of its module.
    """

    def __init__(self, group: Any, place: str) -> None:
        self.group, self.place = group, place
        self._with_gradients: list[Any] = []
        group.post_backward = self._post_backward

    def gathered(self, world: int) -> Lies:
        """Each parameter in an all_gather over `world` ranks."""
        parameters = self.group.fsdp_params
        sizes = [size for parameter in parameters for size in _gathered_sizes(parameter)]
        return Lies(tuple(sizes), tuple(_nominal(parameter, self._shards, world) for parameter in parameters))

    def reduced(self) -> Lies:
        """Each parameter that has a gradient in a reduce_scatter or all_reduce."""
        parameters, shards = self._with_gradients, self._shards
        sizes = [parameter.padded_sharded_param_size.numel() for parameter in parameters]
        return Lies(tuple(sizes), tuple(_nominal(parameter, shards, shards) for parameter in parameters))

    @property
    def _shards(self) -> int:
        return int(getattr(self.group.mesh_info, "shard_mesh_size", 1))

    def _post_backward(self, *unused: Any) -> None:
        self._with_gradients = [parameter for parameter in self.group.fsdp_params if self._is_reduced(parameter)]
        type(self.group).post_backward(self.group, *unused)

    def _is_reduced(self, parameter: Any) -> bool:
        whole = getattr(parameter, "_unsharded_param", None)
        if whole is None:
            return False
        has_gradient = parameter.unsharded_accumulated_grad is not None or whole.grad is not None
        return has_gradient or (self.group.reduce_scatter_unused_params and whole.requires_grad)


def _gathered_sizes(parameter: Any) -> list[int]:
    if hasattr(parameter._sharded_local_tensor, "fsdp_pre_all_gather"):  # made for this very call
        return [math.prod(size) for size in parameter._extensions_data.all_gather_input_sizes]
    if parameter.sharded_state.name == "SHARDED_POST_FORWARD":
        return [parameter._sharded_post_forward_param_data.numel()]
    return [parameter._sharded_param_data.numel()]


def _nominal(parameter: Any, shards: int, world: int) -> int:
    """Elements of a shard over `world` ranks, by nothing that differs between tensor-parallel ranks: see `Lies`."""
    own = parameter.padded_sharded_param_size.numel()
    if parameter.is_dtensor:
        whole = parameter.sharded_param
        ways = [whole.device_mesh.size(i) for i, placed in enumerate(whole.placements) if not placed.is_replicate()]
        own = -(-whole.numel() // math.prod(ways))
    return int(-(-own * shards // world))


def replica_group(group: Any) -> dist.ProcessGroup | None:
    """The group over which a unit's gradients are all_reduced: that of HSDP, or None."""
    found: dist.ProcessGroup | None = getattr(group.mesh_info, "replicate_process_group", None)
    return found
