"""The target x86: CPUs with AVX512-VNNI or AMX, through oneDNN and Inductor."""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType

import torch

from qpass import torch_private
from qpass.patterns import Add, AvgPool, Conv, Embedding, Linear, Matmul, Mul
from qpass.targets.generic.loops import GatherRows, Pointwise
from qpass.targets.target import Target
from qpass.targets.x86.conv import PixelGemmAdd, Qconv, QconvAdd
from qpass.targets.x86.instructions import bfloat16_is_fast
from qpass.targets.x86.linear import Qlinear, QlinearPerToken
from qpass.targets.x86.weight_only import CastCodes, DequantizedRows, PackedCodes


@lru_cache(maxsize=1)
def missing() -> str:
    """Why this machine cannot run the int8 kernels, or "" when it can."""
    if torch_private.is_vnni_supported():
        return ""
    return "this CPU has neither AVX512-VNNI nor AMX; the q/dq graph runs in floating point instead"


def fast_dtype() -> torch.dtype | None:
    """bfloat16 where the CPU has instructions for it."""
    return torch.bfloat16 if bfloat16_is_fast() else None


def expands_attention() -> bool:
    """Whether two bfloat16 matrix products and a softmax beat torch's fused attention, as they do without AMX."""
    return not torch_private.is_amx_tile_supported()


X86 = Target(
    "x86",
    device="cpu",
    kernels=MappingProxyType(
        {
            Linear: (Qlinear(), QlinearPerToken(), PackedCodes(), CastCodes(), DequantizedRows()),
            Matmul: (Qlinear(), QlinearPerToken(), PackedCodes(), CastCodes(), DequantizedRows()),
            Conv: (PixelGemmAdd(), QconvAdd(), Qconv()),
            Embedding: (GatherRows(),),
            Add: (Pointwise(),),
            Mul: (Pointwise(),),
            AvgPool: (Pointwise(),),
        }
    ),
    missing=missing,
    fast_dtype=fast_dtype,
    expands_attention=expands_attention,
    only_behind=MappingProxyType({Add: Conv, Mul: Conv, AvgPool: Conv}),
)
