"""tensors in, the values their codes stand for out: modules that train a network for the rounding it will meet."""

from __future__ import annotations

from qpass.spec.fake_quantize.base import FakeQuantizeBase
from qpass.spec.fake_quantize.fixed import FixedQParamsFakeQuantize
from qpass.spec.fake_quantize.fused import FusedMovingAvgObsFakeQuantize
from qpass.spec.fake_quantize.learnable import LearnableFakeQuantize
from qpass.spec.fake_quantize.observed import FakeQuantize
from qpass.spec.fake_quantize.presets import (
    default_affine_fixed_qparams_fake_quant,
    default_dynamic_fake_quant,
    default_embedding_fake_quant,
    default_embedding_fake_quant_4bit,
    default_fake_quant,
    default_fixed_qparams_range_0to1_fake_quant,
    default_fixed_qparams_range_neg1to1_fake_quant,
    default_fused_act_fake_quant,
    default_fused_per_channel_wt_fake_quant,
    default_fused_wt_fake_quant,
    default_histogram_fake_quant,
    default_per_channel_weight_fake_quant,
    default_symmetric_fixed_qparams_fake_quant,
    default_weight_fake_quant,
    fused_per_channel_wt_fake_quant_range_neg_127_to_127,
    fused_wt_fake_quant_range_neg_127_to_127,
)
from qpass.spec.fake_quantize.schedule import (
    freeze_batch_norm_stats,
    freeze_bn_stats,
    freeze_observers,
    update_batch_norm_stats,
    update_bn_stats,
    update_observers,
)
from qpass.spec.fake_quantize.switches import disable_fake_quant, disable_observer, enable_fake_quant, enable_observer
from qpass.spec.fake_quantize.synchronize import synchronize

__all__ = [
    "FakeQuantize",
    "FakeQuantizeBase",
    "FixedQParamsFakeQuantize",
    "FusedMovingAvgObsFakeQuantize",
    "LearnableFakeQuantize",
    "default_affine_fixed_qparams_fake_quant",
    "default_dynamic_fake_quant",
    "default_embedding_fake_quant",
    "default_embedding_fake_quant_4bit",
    "default_fake_quant",
    "default_fixed_qparams_range_0to1_fake_quant",
    "default_fixed_qparams_range_neg1to1_fake_quant",
    "default_fused_act_fake_quant",
    "default_fused_per_channel_wt_fake_quant",
    "default_fused_wt_fake_quant",
    "default_histogram_fake_quant",
    "default_per_channel_weight_fake_quant",
    "default_symmetric_fixed_qparams_fake_quant",
    "default_weight_fake_quant",
    "disable_fake_quant",
    "disable_observer",
    "enable_fake_quant",
    "enable_observer",
    "freeze_batch_norm_stats",
    "freeze_bn_stats",
    "freeze_observers",
    "fused_per_channel_wt_fake_quant_range_neg_127_to_127",
    "fused_wt_fake_quant_range_neg_127_to_127",
    "synchronize",
    "update_batch_norm_stats",
    "update_bn_stats",
    "update_observers",
]
