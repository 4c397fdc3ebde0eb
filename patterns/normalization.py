"""Normalization: left in floating point, where it fuses with the quantization that follows it."""

from __future__ import annotations

import torch

aten = torch.ops.aten

_STATISTICS = "a normalization computes statistics of its input; it is fused with the rounding behind it instead"

KEPT: dict[object, str] = {
    aten.layer_norm.default: _STATISTICS,
    aten.group_norm.default: _STATISTICS,
    aten.instance_norm.default: _STATISTICS,
    aten.rms_norm.default: _STATISTICS,
    aten.batch_norm.default: "a batch norm that does not directly follow a quantized convolution is not folded",
}
