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

from qpass.comm.wire import bound
from qpass.comm.wire import operators as _ops  # noqa: F401  (registers the operators)
from qpass.comm.wire.format import WireFormat, parse
from qpass.errors import ConfigError, InputError, near


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
        """How far ``decode(encode(x))`` is from `x` at most: float64, shaped like `x` (see `qpass.comm.wire.bound`)."""
        return bound.error_bound(self, x)

    def describe(self) -> str:
        """One line for people: the written form, bits an element, and the bound."""
        return bound.describe(self)


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
        raise InputError(f"A codec is a name or a Codec, not {type(name).__name__}")
    elif name in NAMES:
        found = NAMES[name]
    elif ":" in name:
        form = parse(name)
        found = Codec(form.format, form.block, form.scale, form.hadamard, form.stochastic)
    else:
        raise ConfigError(f"There is no codec {name!r}{near(name, NAMES)}", hint=f"use one of {', '.join(NAMES)}")
    fields = ("block", "scale", "hadamard", "stochastic")
    for option in options:
        if option not in fields:
            raise ConfigError(f"A codec has no option {option!r}{near(option, fields)}")
    return replace(found, **options) if options else found
