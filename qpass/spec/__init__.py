"""What is wanted: how a tensor is quantized, and how a model is; values that compare and hash."""

from qpass.spec.quantization_spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec

__all__ = ["PerChannel", "PerGroup", "PerTensor", "PerToken", "QuantizationSpec"]
