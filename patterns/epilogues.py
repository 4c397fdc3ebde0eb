"""The operations that kernels run on their own result before writing it."""

from __future__ import annotations

from typing import Any

from qpass.ir.expression import aten
from qpass.islands.island import ACTIVATION, BATCH_NORM, FLOAT, Epilogue


def _relu(y: Any) -> Any:
    return aten.relu(y)


def _gelu(y: Any, approximate: Any) -> Any:
    return aten.gelu(y, approximate=approximate)


def _silu(y: Any) -> Any:
    return aten.silu(y)


def _hardswish(y: Any) -> Any:
    return aten.hardswish(y)


def _relu6(y: Any, low: Any, high: Any) -> Any:
    return [aten.hardtanh(y, low, high), aten.relu6(y)]


def _add(y: Any, other: Any) -> Any:
    return [aten.add.Tensor(y, other, alpha=1), aten.add.Tensor(other, y, alpha=1)]


def _batch_norm(y: Any, bn_weight: Any, bn_bias: Any, mean: Any, variance: Any, eps: Any) -> Any:
    return aten.batch_norm(y, bn_weight, bn_bias, mean, variance, False, eps=eps)


relu = Epilogue("relu", _relu)
gelu = Epilogue("gelu", _gelu)
silu = Epilogue("silu", _silu)
hardswish = Epilogue("hardswish", _hardswish)
relu6 = Epilogue("relu6", _relu6)
add = Epilogue("add", _add, {"other": FLOAT})
"""A residual kept in floating point: the stream of a transformer."""
add_codes = Epilogue("add", _add, {"other": ACTIVATION})
"""A residual read as codes: the shortcut of a convolutional block."""
batch_norm = Epilogue(BATCH_NORM, _batch_norm)
"""Folded into the weight when the graph is converted, never run by a kernel."""
