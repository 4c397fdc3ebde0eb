"""qpass::encode, decode, decode_reduce: a tensor as bytes for the wire, and back.

    encode(x, form, seed)                          x -> uint8 [payload_bytes]
    decode(payload, numel, dtype, form)            -> [numel]
    decode_reduce(payloads, numel, dtype, form, divisor)   uint8 [W, payload_bytes] -> [numel], summed in rank order

`form` is the written form of a `WireFormat` (``"int8:128:bf16"``), so that a graph says what it sends. `FORMULAS` gives
each operator in plain ATen, for compilers that fuse it with its neighbours. The operators themselves run kernels that
Inductor compiled (`qpass.comm.wire.compiled_kernels`). Codes have no derivative, so none of the three passes a
gradient on.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qpass import torch_private
from qpass.comm.wire import kernels as wire_kernels
from qpass.comm.wire.compiled_kernels import encode_kernel, encoded, reduce_kernel, split
from qpass.comm.wire.format import CASTS, WireFormat, parse
from qpass.errors import InputError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

AT_ONCE = 1 << 17
"""Elements that are worked on at a time where there are steps: what one keeps for the next stays in a core's cache."""

_library = torch.library.Library("qpass", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("encode(Tensor x, str form, int seed=0) -> Tensor", tags=_TAGS)
_library.define("decode(Tensor payload, SymInt numel, ScalarType dtype, str form) -> Tensor", tags=_TAGS)
_library.define(
    "decode_reduce(Tensor payloads, SymInt numel, ScalarType dtype, str form, int divisor=1) -> Tensor", tags=_TAGS
)


def encode(x: Tensor, form: str, seed: int = 0) -> Tensor:
    """The payload of `x`: any shape and strides, any dtype of `FLOATS`; a new uint8 tensor of one dimension."""
    wire = check_encode(x, form)
    payload = torch.empty(wire.payload_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    encode_into(x.detach().reshape(-1), payload, wire, seed)
    return payload


def decode(payload: Tensor, numel: int, dtype: torch.dtype, form: str) -> Tensor:
    """The `numel` values of `payload` as `dtype`, computed in float32; a new tensor of one dimension."""
    wire = _check_decode(payload, 1, numel, dtype, form)
    out = torch.empty(numel, dtype=dtype, device=payload.device)
    decode_into(_aligned(payload), out, wire)
    return out


def decode_reduce(payloads: Tensor, numel: int, dtype: torch.dtype, form: str, divisor: int = 1) -> Tensor:
    """The sum over the payloads, in rank order in float32, over `divisor`, as `dtype`; a new flat tensor."""
    wire = _check_decode(payloads, 2, numel, dtype, form)
    out = torch.empty(numel, dtype=dtype, device=payloads.device)
    decode_reduce_into(_aligned(payloads), out, wire, divisor)
    return out


def encode_into(x: Tensor, payload: Tensor, wire: WireFormat, seed: int = 0, first: int = 0) -> None:
    """Write the payload of `x` (one dimension, contiguous) to `payload`; nothing is checked.

    `first`: the number of ``x[0]`` in the tensor that `x` is a part of, for stochastic rounding.
    """
    if wire.is_cast:
        payload.view(CASTS[wire.format]).copy_(x)
        return
    if wire.hadamard and x.numel() > max(AT_ONCE, wire.row):
        for part, coded in cuts(x.numel(), wire):
            encode_into(x[part], payload[coded], wire, seed, first + part.start)
        return
    kernel = encode_kernel(wire, x.dtype, x.device, x.numel())
    whole = x.numel() // wire.row
    numbers = [torch.tensor(number, device=x.device) for number in (seed, first)] if wire.stochastic else []
    if whole > 1:
        rows = payload[: whole * wire.width].view(whole, wire.width)
        kernel(x[: whole * wire.row].view(whole, wire.row), *encoded(rows, wire), *numbers)
    else:
        whole = 0
    if rest := x.numel() - whole * wire.row:  # less than two rows, which is what a kernel takes at least
        padded = x.new_zeros(2, wire.row)
        padded.view(-1)[:rest] = x[whole * wire.row :]
        if wire.stochastic:
            numbers[1] = numbers[1] + whole * wire.row
        rows = payload.new_empty(2, wire.width)
        kernel(padded, *encoded(rows, wire), *numbers)
        payload[whole * wire.width :] = rows.view(-1)[: payload.numel() - whole * wire.width]


def decode_into(payload: Tensor, out: Tensor, wire: WireFormat) -> None:
    """Write the values of `payload` to `out` (one dimension, contiguous); nothing is checked."""
    decode_reduce_into(payload.unsqueeze(0), out, wire)


def decode_reduce_into(payloads: Tensor, out: Tensor, wire: WireFormat, divisor: int = 1) -> None:
    """Write the sum of `payloads` ``[W, payload_bytes]`` over `divisor` to `out` (one dimension, contiguous)."""
    if out.numel() == 0:
        return
    if wire.is_cast:
        total = payloads[0].view(CASTS[wire.format]).to(torch.float32)
        for payload in payloads[1:]:
            total = total + payload.view(CASTS[wire.format])
        out.copy_(total / divisor if divisor != 1 else total)
        return
    if wire.hadamard and out.numel() > max(AT_ONCE, wire.row):
        for part, coded in cuts(out.numel(), wire):
            decode_reduce_into(payloads[:, coded], out[part], wire, divisor)
        return
    kernel = reduce_kernel(wire, out.dtype, out.device, out.numel(), len(payloads), divisor)
    whole = out.numel() // wire.row
    if whole > 1:
        rows = [payload[: whole * wire.width].view(whole, wire.width) for payload in payloads]
        kernel(*out[: whole * wire.row].view(whole, wire.row).chunk(wire.pieces, dim=1), *rows)
    else:
        whole = 0
    if rest := out.numel() - whole * wire.row:
        parts = []
        for payload in payloads:
            last = payload[whole * wire.width :]
            padded = last.new_zeros(2, wire.width)
            padded.view(-1)[: last.numel()] = last
            parts.append(padded)
        values = out.new_empty(2, wire.row)
        kernel(*values.chunk(wire.pieces, dim=1), *parts)
        out[whole * wire.row :] = values.view(-1)[:rest]


def cuts(numel: int, wire: WireFormat) -> Iterator[tuple[slice, slice]]:
    """Elements, and their bytes in the payload: whole rows, `AT_ONCE` or fewer where one row is not longer."""
    rows = max(1, AT_ONCE // wire.row)
    for first in range(0, wire.rows(numel), rows):
        last = min(first + rows, wire.rows(numel))
        yield slice(first * wire.row, min(last * wire.row, numel)), slice(first * wire.width, last * wire.width)


def _aligned(payload: Tensor) -> Tensor:
    """Contiguous, and starting where a scale of any format can be read in place."""
    payload = payload.contiguous()
    return payload if payload.storage_offset() % 4 == 0 else payload.clone()


def check_encode(x: Tensor, form: str) -> WireFormat:
    """The format that is written ``form``; refuses what cannot be sent in any."""
    if x.dtype not in FLOATS:
        raise InputError(
            f"A tensor of {x.dtype} cannot be encoded", hint="send integers, bools and complex as they are"
        )
    return parse(form)


def _check_decode(payload: Tensor, dims: int, numel: int, dtype: torch.dtype, form: str) -> WireFormat:
    wire = parse(form)
    if dtype not in FLOATS:
        raise InputError(f"A payload cannot be decoded to {dtype}", hint=f"use one of {', '.join(map(str, FLOATS))}")
    if payload.dtype != torch.uint8 or payload.dim() != dims:
        raise InputError(f"A payload of {dims} dimensions of uint8 is needed, not {payload.dim()} of {payload.dtype}")
    bytes_needed = wire.payload_bytes(numel)
    torch._check_value(
        payload.shape[-1] == bytes_needed,
        lambda: f"{payload.shape[-1]} bytes are not a payload of {numel} elements as {wire}: that takes {bytes_needed}",
    )
    return wire


# Meta


@torch.library.register_fake("qpass::encode", lib=_library)
def _encode_meta(x: Tensor, form: str, seed: int = 0) -> Tensor:
    return x.new_empty(check_encode(x, form).payload_bytes(x.numel()), dtype=torch.uint8)


@torch.library.register_fake("qpass::decode", lib=_library)
def _decode_meta(payload: Tensor, numel: int, dtype: torch.dtype, form: str) -> Tensor:
    _check_decode(payload, 1, numel, dtype, form)
    return payload.new_empty(numel, dtype=dtype)


@torch.library.register_fake("qpass::decode_reduce", lib=_library)
def _decode_reduce_meta(payloads: Tensor, numel: int, dtype: torch.dtype, form: str, divisor: int = 1) -> Tensor:
    _check_decode(payloads, 2, numel, dtype, form)
    return payloads.new_empty(numel, dtype=dtype)


for _name, _function in (("encode", encode), ("decode", decode), ("decode_reduce", decode_reduce)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")


# In plain ATen


def encode_formula(x: Tensor, form: str, seed: int = 0) -> Tensor:
    """`encode` as a graph of ATen operators; sizes may be symbolic, the width of a row never is."""
    wire = check_encode(x, form)
    flat, rows = x.reshape(-1), wire.rows(x.numel())
    if wire.is_cast:
        return flat.to(CASTS[wire.format]).view(torch.uint8)
    padded = torch.nn.functional.pad(flat, (0, rows * wire.row - x.numel())).reshape(rows, wire.row)
    numbers = [torch.full((), number, dtype=torch.int64, device=x.device) for number in (seed, 0)]
    codes, scales = wire_kernels.encode_rows(padded, wire, numbers)
    return torch.cat([*(piece.view(torch.uint8) for piece in codes), scales.view(torch.uint8)], dim=1).reshape(-1)


def decode_formula(payload: Tensor, numel: int, dtype: torch.dtype, form: str) -> Tensor:
    """`decode` as a graph of ATen operators."""
    return decode_reduce_formula(payload.unsqueeze(0), numel, dtype, form)


def decode_reduce_formula(payloads: Tensor, numel: int, dtype: torch.dtype, form: str, divisor: int = 1) -> Tensor:
    """`decode_reduce` as a graph of ATen operators."""
    wire = _check_decode(payloads, payloads.dim(), numel, dtype, form)
    if wire.is_cast:
        total = functools.reduce(
            torch.add, (payload.view(CASTS[wire.format]).to(torch.float32) for payload in payloads)
        )
        return (total / divisor if divisor != 1 else total).to(dtype)
    rows = payloads.reshape(payloads.shape[0], wire.rows(numel), wire.width)  # which may be none
    pieces = wire_kernels.reduce_rows((split(row, wire) for row in rows), wire, divisor)
    return torch.cat(pieces, dim=1).reshape(-1)[:numel].to(dtype)


FORMULAS: dict[torch_private.OpOverload, Callable[..., Any]] = {
    torch.ops.qpass.encode.default: encode_formula,
    torch.ops.qpass.decode.default: decode_formula,
    torch.ops.qpass.decode_reduce.default: decode_reduce_formula,
}
"""Operator -> the same in plain ATen: a decomposition table for ``make_fx`` and Inductor."""
