"""Codec: a tensor as bytes for the wire, and back; what it costs and how far off it can be.

codec("int8")                            block 128, bf16 scales: 8.125 bits an element
codec("int4", hadamard=True)             block 32: 4.5 bits
codec("mxint8")                          the OCP microscaling format: int8, block 32, e8m0 scales
codec("int8:512:fp32:stochastic")        the written form of any of them
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qpass.errors import ConfigError, InputError, near
from qpass.ops import wire_kernels
from qpass.ops.wire_format import CASTS, ROTATION, WireFormat, parse


@dataclass(frozen=True)
class Codec(WireFormat):
    """A `WireFormat` with its operations. Frozen and hashable; `str` gives the written form that `codec` reads."""

    def encode(self, x: Tensor, seed: int = 0) -> Tensor:
        """`x` of any shape and floating dtype -> its payload, uint8 ``[payload_bytes(x.numel())]``.

        `seed` matters to stochastic codecs only: the same seed gives the same bytes.
        """
        return torch.ops.qpass.encode(x, str(self), seed)

    def decode(self, payload: Tensor, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A payload -> its `numel` values, ``[numel]`` of `dtype`."""
        return torch.ops.qpass.decode(payload, numel, dtype, str(self))

    def decode_reduce(
        self, payloads: Tensor, numel: int, dtype: torch.dtype = torch.float32, average: bool = False
    ) -> Tensor:
        """uint8 ``[W, payload_bytes]`` -> ``[numel]`` of `dtype`: the sum in rank order in float32, or the average."""
        divisor = payloads.shape[0] if average else 1
        return torch.ops.qpass.decode_reduce(payloads, numel, dtype, str(self), divisor)

    def error_bound(self, x: Tensor) -> Tensor:
        """How far ``decode(encode(x))`` in float32 is from `x` at most: float64, shaped like `x`; NaN in a lost block.

        A code is off by half a step (a whole one where rounding is stochastic, or where e8m0 saturates at the top);
        steps are `amax / largest` and what rounding the scale adds. fp8 and casts are off by half a unit in the last
        place, or by half the smallest subnormal. A rotation spreads one code's error over 128 elements, and these
        add up to at most sqrt(128) of it. All is widened by 2^-20 for float32's own rounding.
        """
        flat = x.detach().reshape(-1).to(torch.float64)
        if self.is_cast:
            info = torch.finfo(CASTS[self.format])
            bound = (flat.abs() * (info.eps / 2)).clamp(min=info.smallest_normal * info.eps / 2)
            bound = torch.where(flat.abs() <= info.max, bound, torch.nan)
            return bound.reshape(x.shape)
        padded = torch.zeros(self.rows(flat.numel()) * self.row, dtype=torch.float64, device=x.device)
        padded[: flat.numel()] = flat
        sent = wire_kernels.rotate(padded) if self.hadamard and padded.numel() else padded
        blocks = sent.reshape(-1, self.block)
        amax = blocks.abs().amax(1, keepdim=True) if blocks.numel() else blocks[:, :1]
        step = (amax * self._step()).clamp(min=wire_kernels.SMALLEST)
        if self.format == "fp8_e4m3":  # 3 bits behind the point; below 2^-6 the spacing stays 2^-9
            bound = torch.maximum(blocks.abs() * 2.0**-4, step * 2.0**-10) + (amax * 2.0**-4 if self.saturates else 0)
        else:
            bound = (step * (1.0 if self.stochastic or self.saturates else 0.5)).expand_as(blocks)
        bound = torch.where(amax <= wire_kernels.LARGEST, bound, torch.nan).reshape(-1)
        if self.hadamard:
            largest = bound.reshape(-1, ROTATION).amax(1, keepdim=True) * ROTATION**0.5
            bound = largest.expand(-1, ROTATION).reshape(-1)
            bound = bound + wire_kernels.SMALLEST
        return (bound * (1 + 2.0**-20) + 2.0**-20 * padded.abs())[: flat.numel()].reshape(x.shape)

    def describe(self) -> str:
        """One line for people: the written form, bits an element, and the bound."""
        if self.is_cast:
            share = torch.finfo(CASTS[self.format]).eps / 2
            return f"{self}: {self.bits} bits, error at most {share:.2g} of a value"
        share = self._step() * (1.0 if self.stochastic or self.saturates else 0.5)
        if self.format == "fp8_e4m3":
            return f"{self}: {self.bits_per_element:.4g} bits, error at most 2^-4 of a value"
        spread = " after rotation" if self.hadamard else ""
        return (
            f"{self}: {self.bits_per_element:.4g} bits, error at most {share:.2g} of the block's largest value{spread}"
        )

    @property
    def _saturates(self) -> bool:
        return self.scale == "e8m0" and not self.stochastic

    def _step(self) -> float:
        """The largest step of a block over its amax."""
        if self.scale == "e8m0":
            return (
                2.0 / self.largest
                if self.stochastic
                else 2.0 ** -(self.bits - 2)
                if self.bits < 8 or self.format == "int8"
                else 2.0**-8
            )
        return (1.0 + (2.0**-7 if self.scale == "bf16" else 0.0)) / self.largest


NAMES: dict[str, Codec] = {
    "int8": Codec("int8"),
    "int6": Codec("int6"),
    "int4": Codec("int4", block=32),
    "fp8_e4m3": Codec("fp8_e4m3"),
    "mxint8": Codec("int8", block=32, scale="e8m0"),
    "mxfp8": Codec("fp8_e4m3", block=32, scale="e8m0"),
    "bf16": Codec("bf16"),
    "bfp16": Codec("bf16"),  # what torch's DQuantType.BFP16 sends: bfloat16
    "fp16": Codec("fp16"),
    "fp32": Codec("fp32"),
}
"""Short names -> codecs."""


def codec(name: str | Codec, **options: Any) -> Codec:
    """The codec of that name (see `NAMES`) or written form, with some fields changed.

    Args:
        name: ``"int8"``, ``"int4:32:bf16:hadamard"``, or a `Codec`.
        options: fields of `Codec`: block, scale, hadamard, stochastic.

    Raises:
        ConfigError: an unknown name or option, or a combination that does not exist.
    """
    if isinstance(name, Codec):
        found = name
    elif not isinstance(name, str):
        raise InputError(f"A codec is a name or a Codec, not {type(name).__name__}.")
    elif name in NAMES:
        found = NAMES[name]
    elif ":" in name:
        form = parse(name)
        found = Codec(form.format, form.block, form.scale, form.hadamard, form.stochastic)
    else:
        raise ConfigError(f"There is no codec {name!r}{near(name, NAMES)}.", hint=f"use one of {', '.join(NAMES)}")
    fields = ("block", "scale", "hadamard", "stochastic")
    for option in options:
        if option not in fields:
            raise ConfigError(f"A codec has no option {option!r}{near(option, fields)}.")
    return replace(found, **options) if options else found
