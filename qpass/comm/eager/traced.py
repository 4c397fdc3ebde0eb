"""The compressed calls of `torch.distributed`, in a form that `torch.compile` traces into one graph.

A graph has no loops over pieces and does not wait: each call is encode, one or two collectives on bytes, decode.
The values are those of the eager call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.eager.schedule import shots
from qpass.comm.wire.codec import Codec
from qpass.comm.wire.operators import FLOATS
from qpass.comm.wire.partition import partition
from qpass.torch_private import functional_collectives as funcol

_ops = torch.ops.qpass


@dataclass(frozen=True)
class Traced:
    """One function of `torch.distributed` with a codec; each method has the arguments of the function of its name.

    Args:
        form: the written form of `how`.
        quant_loss: what received values are divided by, or None.
        eager: the call for what no graph can hold, which breaks it, and for what is sent in full.
    """

    how: Codec
    form: str
    quant_loss: float | None
    eager: Callable[..., Any]

    def all_gather(self, tensor_list: list[Tensor], tensor: Tensor, group: Any = None, async_op: bool = False) -> Any:
        if not self._sends(tensor, group, async_op):
            return self.eager(tensor_list, tensor, group, async_op)
        for output, values in zip(tensor_list, self._gathered(tensor, group), strict=True):
            self._write(output, values)
        return None

    def all_gather_single(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if not self._sends(input_tensor, group, async_op):
            return self.eager(output_tensor, input_tensor, group, async_op)
        return self._write(output_tensor, torch.cat(self._gathered(input_tensor, group)))

    def all_reduce(self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if not self._sends(tensor, group, async_op, op):
            return self.eager(tensor, op, group, async_op)
        world, numel, average = dist.get_world_size(group), tensor.numel(), op == dist.ReduceOp.AVG
        if shots(numel, self.how, world) == "one_shot":
            payloads = _all_gather(_ops.encode(tensor, self.form), group).reshape(world, -1)
            divisor = world if average else 1
            return self._write(tensor, _ops.decode_reduce(payloads, numel, tensor.dtype, self.form, divisor))
        shares = partition(numel, world, self.how)
        padded = torch.nn.functional.pad(tensor.reshape(-1), (0, shares.numel - numel))
        total = self._summed(padded.split(shares.share), torch.float32, average, group)
        return self._write(tensor, torch.cat(self._gathered(total, group))[:numel].to(tensor.dtype))

    def reduce_scatter(
        self,
        output: Tensor,
        input_list: list[Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if not self._sends(output, group, async_op, op):
            return self.eager(output, input_list, op, group, async_op)
        return self._write(output, self._summed(input_list, output.dtype, op == dist.ReduceOp.AVG, group))

    def reduce_scatter_single(
        self, output: Tensor, input: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if not self._sends(output, group, async_op, op):
            return self.eager(output, input, op, group, async_op)
        parts = input.reshape(-1).split(output.numel())
        return self._write(output, self._summed(parts, output.dtype, op == dist.ReduceOp.AVG, group))

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if not self._sends(input, group, async_op):
            return self.eager(output, input, output_split_sizes, input_split_sizes, group, async_op)
        world, row = dist.get_world_size(group), math.prod(input.shape[1:])
        sends = input_split_sizes or [input.shape[0] // world] * world
        takes = [rows * row for rows in output_split_sizes or [output.shape[0] // world] * world]
        payloads = [_ops.encode(part, self.form) for part in input.split(sends)]
        in_bytes, out_bytes = [len(payload) for payload in payloads], [self.how.payload_bytes(n) for n in takes]
        received = _all_to_all(torch.cat(payloads), out_bytes, in_bytes, group)
        parts = zip(received.split(out_bytes), takes, strict=True)
        return self._write(output, torch.cat([_ops.decode(part, n, output.dtype, self.form) for part, n in parts]))

    def _sends(self, x: Tensor, group: Any, async_op: bool, op: Any = dist.ReduceOp.SUM) -> bool:
        shorter = x.dtype in FLOATS and self.how.bits_per_element < 8 * x.element_size()
        sums = op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG)
        return shorter and sums and not async_op and dist.get_world_size(group) > 1

    def _gathered(self, x: Tensor, group: Any) -> list[Tensor]:
        payload = _all_gather(_ops.encode(x, self.form), group)
        parts = payload.reshape(dist.get_world_size(group), -1).unbind()
        return [_ops.decode(part, x.numel(), x.dtype, self.form) for part in parts]

    def _summed(self, parts: Sequence[Tensor], dtype: torch.dtype, average: bool, group: Any) -> Tensor:
        payloads = torch.cat([_ops.encode(part, self.form) for part in parts])
        received = _all_to_all(payloads, None, None, group).reshape(len(parts), -1)
        return _ops.decode_reduce(received, parts[0].numel(), dtype, self.form, len(parts) if average else 1)

    def _write(self, output: Tensor, values: Tensor) -> None:
        values = values.reshape(output.shape)
        output.copy_(values if self.quant_loss is None else values / self.quant_loss)


METHODS = {
    "all_gather": "all_gather", "all_gather_into_tensor": "all_gather_single", "all_gather_single": "all_gather_single",
    "all_reduce": "all_reduce", "all_to_all_single": "all_to_all_single", "reduce_scatter": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter_single", "reduce_scatter_tensor": "reduce_scatter_single",
}  # fmt: skip
"""Function of `torch.distributed` that Dynamo can trace -> method of `Traced`."""


def traced(name: str, how: Codec, quant_loss: float | None, eager: Callable[..., Any]) -> Callable[..., Any]:
    """The traceable form of the function of that name, or `eager` where there is none."""
    if name not in METHODS:
        return eager
    return getattr(Traced(how, str(how), quant_loss, eager), METHODS[name])


def _all_gather(payload: Tensor, group: Any) -> Tensor:
    return funcol.all_gather_single(payload, 0, _members(group))


def _all_to_all(payload: Tensor, outputs: list[int] | None, inputs: list[int] | None, group: Any) -> Tensor:
    return funcol.all_to_all_single(payload, outputs, inputs, _members(group))


def _members(group: Any) -> Any:
    return group or dist.group.WORLD
