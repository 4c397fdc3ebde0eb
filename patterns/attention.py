"""Attention: left in ``compute_dtype``."""

from __future__ import annotations

import torch

aten = torch.ops.aten

_SCORES = (
    "attention multiplies two activations, whose codes would have to be packed at run time; "
    "in bfloat16 the fused kernel is faster and loses nothing to rounded probabilities"
)

_FUSED = (
    "torch's fused layer hides its products: prepare and convert the model, which traces it layer by layer, "
    "or call torch.backends.mha.set_fastpath_enabled(False) before it is compiled"
)

KEPT: dict[object, str] = {
    aten._transformer_encoder_layer_fwd.default: _FUSED,
    aten._native_multi_head_attention.default: _FUSED,
    aten.scaled_dot_product_attention.default: _SCORES,
    aten.softmax.int: "probabilities span many orders of magnitude; 8 bits would flush the small ones to zero",
    aten._softmax.default: "probabilities span many orders of magnitude; 8 bits would flush the small ones to zero",
    aten.bmm.default: _SCORES,
    aten.baddbmm.default: _SCORES,
}
