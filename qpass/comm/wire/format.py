"""WireFormat: how a tensor lies in a payload, as a value that compares, hashes and has a written form.

A payload is one flat uint8 buffer, made of rows of constant width. A row holds `row` elements: their codes, then the
scales of their blocks, in the machine's byte order (little-endian on all that torch runs on)::

    int8, block 128, bf16 scales     | 128 codes            | 1 scale  |   130 bytes, 8.125 bits an element
    int4, block 32, bf16 scales      |  64 bytes of codes   | 4 scales |    72 bytes, 4.5 bits an element

The last row is padded with zeros, which never change its scale: a zero is not larger than anything. The formats that
only cast (`bf16`, `fp16`, `fp32`) have no blocks and no padding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from qpass.errors import ConfigError, near

CODES: dict[str, tuple[int, float]] = {"int8": (8, 127.0), "int6": (6, 31.0), "int4": (4, 7.0), "fp8_e4m3": (8, 448.0)}
"""Formats with block scales -> bits of a code, the largest magnitude it holds."""

CASTS: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""Formats without scales -> the dtype that an element is cast to."""

SCALES = {"bf16": 2, "fp32": 4, "e8m0": 1}
"""Formats of a scale -> its bytes. `e8m0` is the 8-bit exponent of the OCP microscaling formats, 255 being NaN."""

ROTATION = 128
"""Elements that a Hadamard rotation mixes."""

FORMATS = (*CODES, *CASTS)


@dataclass(frozen=True)
class WireFormat:
    """A codec's layout and arithmetic, but for its seed.

    Args:
        format: one of `CODES` (block scales) or `CASTS` (a plain cast).
        block: elements that share a scale, any number.
        scale: one of `SCALES`.
        hadamard: rotate every 128 elements by an orthonormal Hadamard matrix first, which spreads outliers.
        stochastic: round up or down at random, so that the decoded value is right on average.
    """

    format: str
    block: int = 128
    scale: str = "bf16"
    hadamard: bool = False
    stochastic: bool = False

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(
                f"There is no wire format {self.format!r}{near(self.format, FORMATS)}",
                hint=f"use one of {', '.join(FORMATS)}",
            )
        if self.scale not in SCALES:
            raise ConfigError(
                f"There is no scale format {self.scale!r}{near(self.scale, SCALES)}",
                hint=f"use one of {', '.join(SCALES)}",
            )
        if self.is_cast:
            if self.hadamard or self.stochastic:
                raise ConfigError(f"{self.format} is a cast: it has neither rotation nor stochastic rounding")
            return
        if not isinstance(self.block, int) or self.block < 1:
            raise ConfigError(f"A block has a whole, positive number of elements, not {self.block!r}")
        if self.hadamard and self.row % ROTATION:
            raise ConfigError(
                f"A rotation mixes {ROTATION} elements, which do not fit blocks of {self.block}",
                hint=f"use a block that divides {ROTATION} or is a multiple of it",
            )
        if self.stochastic and self.format == "fp8_e4m3":
            raise ConfigError("fp8_e4m3 has no stochastic rounding", hint="use int8, int6 or int4")

    @property
    def is_cast(self) -> bool:
        """Whether elements are only cast, one by one."""
        return self.format in CASTS

    @property
    def saturates(self) -> bool:
        """Whether the largest values of a block may be cut off: MXINT8's scale is a power of two, rounded down.

        That costs a block's largest value at most one step and gives all others half as large ones. fp8 has less to
        gain from it and stochastic rounding would be biased: both round up.
        """
        return self.scale == "e8m0" and not self.stochastic and self.format != "fp8_e4m3"

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 * CASTS[self.format].itemsize if self.is_cast else CODES[self.format][0]

    @property
    def largest(self) -> float:
        """The largest magnitude of a code."""
        return CODES[self.format][1]

    @property
    def pieces(self) -> int:
        """Equal pieces that a row is decoded in: the codes of a byte lie one piece apart."""
        return 1 if self.is_cast or self.hadamard else {8: 1, 6: 4, 4: 2}[self.bits]

    @property
    def code_pieces(self) -> int:
        """Equal pieces that the bytes of a row's codes are encoded in: what 6 bits spread over three bytes."""
        return 3 if self.bits == 6 else 1

    @property
    def row(self) -> int:
        """Elements of a row: whole blocks, about 128 elements or more; 1 where there are no blocks.

        The codes of a row fill whole bytes, and whole scales: so scales lie where their dtype can be read in place.
        """
        if self.is_cast:
            return 1
        blocks = max(1, 128 // self.block)
        while self.block * blocks * self.bits % (8 * SCALES[self.scale]):
            blocks += 1
        return self.block * blocks

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of a row."""
        return self.row * self.bits // 8

    @property
    def width(self) -> int:
        """Bytes of a row."""
        scales = 0 if self.is_cast else self.row // self.block * SCALES[self.scale]
        return self.code_bytes + scales

    @property
    def bits_per_element(self) -> float:
        """Bits an element costs on the wire, scales included, padding not."""
        return 8 * self.width / self.row

    def rows(self, numel: Any) -> Any:
        """Rows of a payload of `numel` elements (an int; symbolic sizes stay symbolic)."""
        return (numel + (self.row - 1)) // self.row

    def payload_bytes(self, numel: Any) -> Any:
        """Bytes of a payload of `numel` elements (an int; symbolic sizes stay symbolic)."""
        return self.rows(numel) * self.width

    def __str__(self) -> str:
        """The written form, which `parse` reads: ``int4:32:bf16:hadamard``."""
        if self.is_cast:
            return self.format
        flags = [name for name in ("hadamard", "stochastic") if getattr(self, name)]
        return ":".join([self.format, str(self.block), self.scale, *flags])


@functools.cache
def parse(text: str) -> WireFormat:
    """``"int8:128:bf16"`` -> its `WireFormat`. What is left out has its default; the order is that of the fields."""
    name, *options = text.split(":")
    found: dict[str, str | int | bool] = {}
    for option in options:
        if option.isdigit():
            found["block"] = int(option)
        elif option in SCALES:
            found["scale"] = option
        elif option in ("hadamard", "stochastic"):
            found[option] = True
        else:
            known = (*SCALES, "hadamard", "stochastic")
            raise ConfigError(f"{option!r} in the wire format {text!r} is not an option{near(option, known)}")
    return WireFormat(name, **found)  # type: ignore[arg-type]
