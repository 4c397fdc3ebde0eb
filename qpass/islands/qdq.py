"""Reading q/dq pairs: what a quantize or dequantize node says about its codes, for every granularity alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.arithmetic import graph_ops as ops
from qpass.ir.match import normalized
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken
from qpass.spec.quantization_spec import Granularity

QUANTIZE: dict[Any, type[Granularity]] = {
    ops.quantize_per_tensor.default: PerTensor,
    ops.quantize_per_tensor.tensor: PerTensor,
    ops.quantize_per_tensor.tensor2: PerTensor,
    ops.quantize_per_channel.default: PerChannel,
    ops.quantize_per_token.default: PerToken,
    ops.quantize_per_channel_group.default: PerGroup,
}
DEQUANTIZE: dict[Any, type[Granularity]] = {
    ops.dequantize_per_tensor.default: PerTensor,
    ops.dequantize_per_tensor.tensor: PerTensor,
    ops.dequantize_per_tensor.tensor2: PerTensor,
    ops.dequantize_per_channel.default: PerChannel,
    ops.dequantize_per_token.default: PerToken,
    ops.dequantize_per_channel_group.default: PerGroup,
}
CHOOSE = {
    ops.choose_qparams.tensor, ops.choose_qparams_symmetric.tensor, ops.choose_qparams_per_token.default,
    ops.choose_qparams_per_token_asymmetric.default,
}  # fmt: skip
SYMMETRIC_CHOICES = {ops.choose_qparams_symmetric.tensor, ops.choose_qparams_per_token.default}


@dataclass(frozen=True)
class QParams:
    """The parameters of one q or dq node: ``scale`` and ``zero_point`` are numbers when static, nodes otherwise."""

    granularity: Granularity
    scale: Any
    zero_point: Any
    quant_min: int
    quant_max: int
    dtype: torch.dtype

    @property
    def is_static(self) -> bool:
        """Whether scale and zero point are numbers written in the graph."""
        return isinstance(self.scale, float) and isinstance(self.zero_point, int)

    @property
    def fills_dtype(self) -> bool:
        """Whether the quant range is the whole range of the storage type, which is what kernels saturate to."""
        info = torch.iinfo(self.dtype)
        return (self.quant_min, self.quant_max) == (info.min, info.max)


@dataclass(frozen=True)
class QdqNode:
    """One quantize or dequantize node: ``value`` is what goes in (values for q, codes for dq)."""

    node: fx.Node
    value: fx.Node
    qparams: QParams


def as_quantize(node: Any) -> QdqNode | None:
    """The reading of a quantize node, or None for any other node."""
    return _read(node, QUANTIZE)


def as_dequantize(node: Any) -> QdqNode | None:
    """The reading of a dequantize node, or None for any other node."""
    return _read(node, DEQUANTIZE)


def _read(node: Any, table: dict[Any, type[Granularity]]) -> QdqNode | None:
    kind = table.get(node.target) if isinstance(node, fx.Node) and node.op == "call_function" else None
    if kind is None:
        return None
    given = normalized(node)
    scale = given.get("scale", given.get("scales"))
    zero_point = given.get("zero_point", given.get("zero_points"))
    granularity: Granularity = PerToken() if kind is PerToken else PerTensor()
    if kind is PerChannel:
        granularity = PerChannel(given["axis"])
    elif kind is PerGroup:
        granularity = PerGroup(given["group_size"])
    qparams = QParams(granularity, scale, zero_point, given["quant_min"], given["quant_max"], given["dtype"])
    return QdqNode(node, given["input"], qparams)


def only_quantize(node: fx.Node) -> QdqNode | None:
    """The single quantize node that reads ``node``, when it is the only reader."""
    if len(node.users) != 1:
        return None
    return as_quantize(next(iter(node.users)))


def cast_of(node: Any, dtype: torch.dtype | None = None) -> fx.Node | None:
    """What a ``aten.to.dtype`` node casts (to ``dtype`` when given), or None for any other node."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or node.target is not torch.ops.aten.to.dtype:
        return None
    if dtype is not None and node.args[1] != dtype:
        return None
    return node.args[0]  # type: ignore[return-value]
