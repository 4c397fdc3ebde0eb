"""Configurations that most models need, by name."""

from qpass.spec.presets import PRESETS, get, int8_dynamic, int8_qat, int8_static, int8_weight_only

__all__ = ["PRESETS", "get", "int8_dynamic", "int8_qat", "int8_static", "int8_weight_only"]
