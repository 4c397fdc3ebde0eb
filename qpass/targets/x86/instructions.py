"""What the instructions of this CPU make fast."""

from __future__ import annotations

import torch

from qpass import torch_private


def bfloat16_is_fast() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own, AVX512-BF16 or AMX, and torch uses them."""
    if not torch.backends.mkldnn.is_available() or not torch_private.is_mkldnn_bf16_supported():
        return False
    return torch_private.is_avx512_bf16_supported() or torch_private.is_amx_tile_supported()
