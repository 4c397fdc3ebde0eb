"""Observers with their keywords given, under torch.ao's names."""

from __future__ import annotations

import torch

from qpass.spec.observers.fixed import FixedQParamsObserver
from qpass.spec.observers.histogram import HistogramObserver
from qpass.spec.observers.min_max import MinMaxObserver, PerChannelMinMaxObserver
from qpass.spec.observers.placeholder import PlaceholderObserver, RecordingObserver, ReuseInputObserver

default_observer = MinMaxObserver.with_args(quant_min=0, quant_max=127)
"""Activations, codes 0..127: one bit is left out, so that 16-bit sums of products do not overflow."""

default_placeholder_observer = PlaceholderObserver
default_debug_observer = RecordingObserver
default_reuse_input_observer = ReuseInputObserver

default_weight_observer = MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)

weight_observer_range_neg_127_to_127 = MinMaxObserver.with_args(
    dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-127, quant_max=127, eps=2**-12
)

default_histogram_observer = HistogramObserver.with_args(quant_min=0, quant_max=127)

default_per_channel_weight_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.qint8, qscheme=torch.per_channel_symmetric
)

per_channel_weight_observer_range_neg_127_to_127 = PerChannelMinMaxObserver.with_args(
    dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=-127, quant_max=127, eps=2**-12
)

default_dynamic_quant_observer = PlaceholderObserver.with_args(
    dtype=torch.quint8, quant_min=0, quant_max=255, is_dynamic=True
)

default_float_qparams_observer = PerChannelMinMaxObserver.with_args(
    dtype=torch.quint8, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)
"""Embeddings: the zero point is a float, so the smallest value of each row is exact."""

default_float_qparams_observer_4bit = PerChannelMinMaxObserver.with_args(
    dtype=torch.quint4x2, qscheme=torch.per_channel_affine_float_qparams, ch_axis=0
)

default_fixed_qparams_range_neg1to1_observer = FixedQParamsObserver.with_args(
    scale=2 / 256, zero_point=128, dtype=torch.quint8, quant_min=0, quant_max=255
)
"""tanh and its like: values of -1..1."""

default_fixed_qparams_range_0to1_observer = FixedQParamsObserver.with_args(
    scale=1 / 256, zero_point=0, dtype=torch.quint8, quant_min=0, quant_max=255
)
"""sigmoid, softmax: values of 0..1."""

default_symmetric_fixed_qparams_observer = default_fixed_qparams_range_neg1to1_observer
default_affine_fixed_qparams_observer = default_fixed_qparams_range_0to1_observer
