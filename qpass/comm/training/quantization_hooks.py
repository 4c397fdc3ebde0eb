"""torch's two quantization hooks for DDP, under their names and with their signatures.

Annotations are not postponed in this file: DDP compares those of a hook with the classes themselves.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch.distributed import GradBucket  # type: ignore[attr-defined]  # exported, but not said to be

from qpass.comm.training.ddp_hooks import DDPHook
from qpass.comm.wire.codec import Codec, codec


def quantization_pertensor_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """The average of a bucket, sent as int8 with a scale for every 128 elements.

    The name is torch's, and the call; one scale a tensor would let one outlier erase all other gradients.
    Use it as ``model.register_comm_hook(process_group, quantization_pertensor_hook)``.

    Args:
        process_group: None for the default group.
        bucket: float16, bfloat16, float32 or float64; the result has its dtype.
    """
    return _shared_hook(codec("int8"))(process_group, bucket)


def quantization_perchannel_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket, bucket_size: int = 512
) -> torch.futures.Future[torch.Tensor]:
    """`quantization_pertensor_hook` with a scale for every `bucket_size` elements."""
    return _shared_hook(codec("int8", block=bucket_size))(process_group, bucket)


@cache
def _shared_hook(codec: Codec) -> DDPHook:
    """Without error feedback a hook remembers nothing of a model, so one serves all."""
    return DDPHook(codec)
