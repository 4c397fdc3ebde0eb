"""Fake-quantize modules with their keywords given, under torch.ao's names."""

from __future__ import annotations

import torch

from qpass.spec.fake_quantize.fixed import FixedQParamsFakeQuantize
from qpass.spec.fake_quantize.fused import FusedMovingAvgObsFakeQuantize
from qpass.spec.fake_quantize.observed import FakeQuantize
from qpass.spec.observers import (
    HistogramObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    default_fixed_qparams_range_0to1_observer,
    default_fixed_qparams_range_neg1to1_observer,
)

ACTIVATION = {"quant_min": 0, "quant_max": 255, "dtype": torch.quint8}
WEIGHT = {"quant_min": -128, "quant_max": 127, "dtype": torch.qint8, "qscheme": torch.per_tensor_symmetric}
CHANNELS = WEIGHT | {"qscheme": torch.per_channel_symmetric}
CENTRED = {"quant_min": -127, "quant_max": 127, "eps": 2**-12}

default_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, qscheme=torch.per_tensor_affine, reduce_range=True, **ACTIVATION
)
"""Activations; `reduce_range` halves the codes to 0..127."""

default_weight_fake_quant = FakeQuantize.with_args(observer=MovingAverageMinMaxObserver, reduce_range=False, **WEIGHT)

default_dynamic_fake_quant = FakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, is_dynamic=True, averaging_constant=1, **ACTIVATION
)

default_fixed_qparams_range_neg1to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_neg1to1_observer
)
default_fixed_qparams_range_0to1_fake_quant = FixedQParamsFakeQuantize.with_args(
    observer=default_fixed_qparams_range_0to1_observer
)
default_symmetric_fixed_qparams_fake_quant = default_fixed_qparams_range_neg1to1_fake_quant
default_affine_fixed_qparams_fake_quant = default_fixed_qparams_range_0to1_fake_quant

default_per_channel_weight_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, reduce_range=False, ch_axis=0, **CHANNELS
)

default_embedding_fake_quant = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    ch_axis=0,
    averaging_constant=1,
    **ACTIVATION,
)
"""Embeddings: float zero points, and the range of each row as it is now."""

default_embedding_fake_quant_4bit = FakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver,
    qscheme=torch.per_channel_affine_float_qparams,
    ch_axis=0,
    dtype=torch.quint4x2,
    averaging_constant=1,
)

default_histogram_fake_quant = FakeQuantize.with_args(
    observer=HistogramObserver, qscheme=torch.per_tensor_affine, reduce_range=True, **ACTIVATION
)

default_fused_act_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **ACTIVATION
)
default_fused_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(observer=MovingAverageMinMaxObserver, **WEIGHT)
default_fused_per_channel_wt_fake_quant = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, **CHANNELS
)
fused_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAverageMinMaxObserver, **WEIGHT | CENTRED
)
"""Weights whose codes are -127..127, so that minus a value has minus its code."""

fused_per_channel_wt_fake_quant_range_neg_127_to_127 = FusedMovingAvgObsFakeQuantize.with_args(
    observer=MovingAveragePerChannelMinMaxObserver, **CHANNELS | CENTRED
)
