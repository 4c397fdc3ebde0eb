"""The kernels of the wire formats, compiled by Inductor on first use and kept; eager where no compiler is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass.ops import wire_kernels
from qpass.ops.wire_format import WireFormat

Kernel = Callable[..., Any]


def rows_kernel(name: str, wire: WireFormat, floats: Tensor, world: int = 1, divisor: int = 1) -> Kernel:
    """The kernel `name` ("encode", "decode_reduce") for tensors like `floats`.

    encode:         ``(x [rows, row], out uint8 [rows, width], seed, first)``; the last two only for stochastic formats
    decode_reduce:  ``(payloads uint8 [world, rows, width], out [rows, row])``
    """
    return _eager(name, wire, divisor)


def _eager(name: str, wire: WireFormat, divisor: int) -> Kernel:
    def encode(x: Tensor, out: Tensor, *numbers: Tensor) -> None:
        seed, first = numbers or (torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64))
        out.copy_(wire_kernels.encode_rows(x, wire, seed, first))

    def decode_reduce(payloads: Tensor, out: Tensor) -> None:
        out.copy_(wire_kernels.reduce_rows(payloads, wire, divisor))

    return encode if name == "encode" else decode_reduce
