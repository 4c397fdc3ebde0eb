"""torch.ao's observer keywords -> a QuantizationSpec."""

from __future__ import annotations

from typing import Any

import torch

from qpass.arithmetic.numerics import RANGES
from qpass.errors import ConfigError
from qpass.spec import PerTensor, PerToken, QuantizationSpec
from qpass.spec.quantization_spec import Granularity

STORAGE = {
    torch.qint8: torch.int8,
    torch.quint8: torch.uint8,
    torch.qint32: torch.int32,
    torch.quint4x2: torch.uint8,
    torch.quint2x4: torch.uint8,
}
"""torch's quantized dtypes, and the plain dtype that stores their codes."""

NARROW = {torch.quint4x2: (0, 15), torch.quint2x4: (0, 3)}
"""Dtypes whose codes are fewer than those of the dtype that stores them."""

for bits in range(1, 8):
    signed, unsigned = getattr(torch, f"int{bits}"), getattr(torch, f"uint{bits}")
    STORAGE |= {signed: torch.int8, unsigned: torch.uint8}
    NARROW |= {signed: (-(1 << bits - 1), (1 << bits - 1) - 1), unsigned: (0, (1 << bits) - 1)}
PER_TENSOR = (torch.per_tensor_affine, torch.per_tensor_symmetric)


def spec_from_keywords(
    dtype: torch.dtype,
    qscheme: torch.qscheme,
    granularity: Granularity,
    quant_min: int | None,
    quant_max: int | None,
    eps: Any = None,
    is_dynamic: bool = False,
    reduce_range: bool = False,
) -> QuantizationSpec:
    """The spec that torch.ao's observer keywords describe: there a missing bound means the dtype's, symmetric or not.

    ``qint8 quint8 qint32 quint4x2 int4 uint4 ...`` stand for their storage dtypes.

    Args:
        eps: a number, or a tensor of one element.
        reduce_range: halve both bounds, one bit less: for kernels that would overflow 16-bit sums.

    Raises:
        ConfigError: one of the keywords, or their combination, means nothing.
    """
    if not isinstance(qscheme, torch.qscheme):
        raise ConfigError(f"An observer's qscheme is one of torch's, such as torch.per_tensor_affine, not {qscheme!r}")
    if (qscheme in PER_TENSOR) != isinstance(granularity, PerTensor | PerToken):
        raise ConfigError(f"An observer with {granularity} cannot have the qscheme {qscheme}")
    storage = STORAGE.get(dtype, dtype)
    if storage in RANGES:  # the spec says what is wrong with another
        low, high = NARROW.get(dtype, RANGES[storage])
        quant_min = low if quant_min is None else quant_min
        quant_max = high if quant_max is None else quant_max
        if reduce_range:
            quant_min, quant_max = quant_min // 2, quant_max // 2
    eps = None if eps is None else float(eps)
    symmetric = qscheme in (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return QuantizationSpec(storage, granularity, symmetric, is_dynamic, quant_min, quant_max, eps=eps)
