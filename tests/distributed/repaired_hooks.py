"""What torch's two quantization hooks for DDP compute, in a form that runs on gloo.

As they stand in torch 2.13 they read a gloo future as if NCCL had made it and raise on every input. Here that is put
right, as in later versions of torch, and all else is as there: one all_gather of scales and zero points in float32,
another of one code a float, codes made channel by channel in Python, waiting inside the callback.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver


def pertensor_hook(group: dist.ProcessGroup, bucket: Any) -> torch.futures.Future[Tensor]:
    return _hook(group, bucket.buffer(), bucket.buffer().unsqueeze(0), MinMaxObserver())


def perchannel_hook(group: dist.ProcessGroup, bucket: Any, bucket_size: int = 512) -> torch.futures.Future[Tensor]:
    buffer = bucket.buffer()
    missing = bucket_size - buffer.numel() % bucket_size
    channels = torch.nn.functional.pad(buffer, (0, missing)).view(-1, bucket_size)
    return _hook(group, buffer, channels, PerChannelMinMaxObserver())


def _hook(group: dist.ProcessGroup, buffer: Tensor, channels: Tensor, observer: Any) -> torch.futures.Future[Tensor]:
    world = group.size()
    observer(channels)
    scale, zero_point = (qparam.reshape(-1).float() for qparam in observer.calculate_qparams())
    own = torch.stack((scale, zero_point))
    qparams = [torch.zeros_like(own) for _ in range(world)]

    def send_codes(future: torch.futures.Future[Any]) -> list[Tensor]:
        future.wait()
        values = torch.zeros_like(channels)
        for channel in range(len(channels)):
            values[channel] = torch.round(channels[channel] / scale[channel]) + zero_point[channel]
        codes = torch.clamp(values, 0, 255).to(torch.uint8)
        gathered = [torch.zeros_like(codes) for _ in range(world)]
        dist.all_gather(gathered, codes, group=group, async_op=True).get_future().wait()
        return gathered

    def average(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        total = torch.zeros(channels.shape)
        for codes, (scales, zero_points) in zip(future.wait(), qparams, strict=True):
            values = torch.zeros(channels.shape)
            for channel in range(len(channels)):
                values[channel] = scales[channel] * (codes[channel].float() - zero_points[channel])
            total += values
        return total.flatten()[: buffer.numel()] / world

    first = dist.all_gather(qparams, own, group=group, async_op=True).get_future()
    return first.then(send_codes).then(average)
