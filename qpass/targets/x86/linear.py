"""x86 CPUs: oneDNN's int8 GEMMs, and what all x86 kernels ask of their operands.

The kernels multiply unsigned activations by signed weights (``vpdpbusd``). Signed activation codes are shifted by 128
together with their zero point, which is exact; without it oneDNN falls back to a scalar reference loop on CPUs that
have VNNI but not AMX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass.ir.editor import Editor
from qpass.ir.rule import require
from qpass.islands.island import IslandMatch, Specs, codes_of, quantized_operands, uncast
from qpass.islands.qdq import cast_of, only_quantize
from qpass.spec import PerChannel, PerTensor, PerToken, QuantizationSpec
from qpass.targets.target import Kernel, Output
from qpass.targets.x86.packing import pack_linear, unsigned

aten = torch.ops.aten
onednn = torch.ops.onednn

LINEAR_FUSIONS = frozenset({(), ("relu",), ("gelu",), ("silu",), ("hardswish",), ("relu6",), ("add",), ("add", "relu")})
UNARY = {"relu": "relu", "gelu": "gelu", "silu": "swish", "hardswish": "hardswish", "relu6": "hardtanh"}


def check_activation(spec: QuantizationSpec | None) -> None:
    """Refuse activations that the GEMM cannot read as 8-bit codes."""
    require(spec is not None, "the activation is not quantized")
    assert spec is not None
    require(is_bytes(spec.dtype), f"the kernel reads 8-bit codes, not {spec.dtype}")


def check_weight(m: IslandMatch, spec: QuantizationSpec | None) -> None:
    """Refuse weights other than int8, symmetric, one scale per output channel."""
    require(spec is not None, "the weight is not quantized")
    assert spec is not None
    axis = m.operands["w"].axis
    rank = m.w.meta["val"].dim()
    per_channel = isinstance(spec.granularity, PerChannel) and spec.granularity.axis % rank == axis
    require(per_channel, f"the kernel takes one weight scale per output channel (axis {axis})")
    require(spec.dtype == torch.int8 and spec.symmetric, "the kernel takes symmetric int8 weights")


def requantized_output(m: IslandMatch) -> Output:
    """The kernel's result followed to the quantize or bfloat16 cast that alone reads it."""
    pair = only_quantize(m.output)
    if pair is not None and pair.qparams.is_static and pair.qparams.fills_dtype and is_bytes(pair.qparams.dtype):
        return Output(pair.node, pair.qparams.dtype, pair.qparams.scale, pair.qparams.zero_point)
    if len(m.output.users) == 1:
        user = next(iter(m.output.users))
        if cast_of(user, torch.bfloat16) is not None:
            return Output(user, torch.bfloat16)
    return Output(m.output)


def is_bytes(dtype: torch.dtype) -> bool:
    """Whether codes of this dtype are what the kernels read and write."""
    return dtype in (torch.uint8, torch.int8)


class Qlinear(Kernel):
    """``act(linear(dq(x), dq(w), b) [+ other]) -> onednn.qlinear_pointwise``, static or dynamic per tensor."""

    name = "onednn.qlinear"
    fusions = LINEAR_FUSIONS

    def check(self, m: IslandMatch, specs: Specs) -> None:
        check_activation(specs.get("x"))
        require(isinstance(specs["x"].granularity, PerTensor), "qlinear takes one activation scale per tensor")
        check_weight(m, specs.get("w"))
        if "add" in m.fused:
            check_same_shape(m)

    def output(self, m: IslandMatch) -> Output:
        return requantized_output(m)

    def emit(self, m: IslandMatch, out: Output, edit: Editor) -> fx.Node:
        x = quantized_operands(m)["x"]
        codes, zero_point = unsigned(codes_of(m, "x"), x.dtype, x.zero_point, edit, out.node)
        dim = m.x.meta["val"].dim()
        if dim == 1:
            codes = edit.call(aten.unsqueeze.default, codes, 0, like=m.root, before=out.node)
        weight = pack_linear(m, edit, out.node)
        tail = (out.scale, out.zero_point, out.dtype)
        unary = unary_post_op(m)
        head = (codes, x.scale, zero_point, *weight)
        arguments: tuple[Any, ...]
        if "add" in m.fused:
            op = onednn.qlinear_pointwise.binary if x.is_static else onednn.qlinear_pointwise.binary_tensor
            other = uncast(m.other)
            if dim == 1:
                other = edit.call(aten.unsqueeze.default, other, 0, like=m.root, before=out.node)
            arguments = (*head, other, m.b, *tail, 1.0, 0, "add", 1.0, *unary)
        else:
            op = onednn.qlinear_pointwise.default if x.is_static else onednn.qlinear_pointwise.tensor
            arguments = (*head, m.b, *tail, *unary)
        result = edit.call(op, *arguments, like=m.output, before=out.node)
        if dim == 1:
            result = edit.call(aten.squeeze.dim, result, 0, like=m.output, before=out.node)
        return result


class QlinearPerToken(Kernel):
    """``linear(dq_per_token(x), dq(w), b) -> qlinear(x, w) * scale + b``: one scale a row, applied after the GEMM."""

    name = "onednn.qlinear (per token)"

    def check(self, m: IslandMatch, specs: Specs) -> None:
        check_activation(specs.get("x"))
        require(isinstance(specs["x"].granularity, PerToken), "this kernel takes one activation scale per token")
        require(specs["x"].symmetric, "per-token activations are symmetric in the int8 kernel")
        check_weight(m, specs.get("w"))

    def emit(self, m: IslandMatch, out: Output, edit: Editor) -> fx.Node:
        x = quantized_operands(m)["x"]
        codes, zero_point = unsigned(codes_of(m, "x"), x.dtype, 0, edit, out.node)
        dim = m.x.meta["val"].dim()
        if dim == 1:
            codes = edit.call(aten.unsqueeze.default, codes, 0, like=m.root, before=out.node)
        weight = pack_linear(m, edit, out.node)
        result = edit.call(
            onednn.qlinear_pointwise.default, codes, 1.0, zero_point, *weight, None, 1.0, 0, torch.float32,
            "none", [], "", like=m.root, before=out.node,
        )  # fmt: skip
        if dim == 1:
            result = edit.call(aten.squeeze.dim, result, 0, like=m.root, before=out.node)
        result = edit.call(aten.mul.Tensor, result, x.scale, like=m.root, before=out.node)
        if m.b is not None:
            result = edit.call(aten.add.Tensor, result, m.b, like=m.output, before=out.node)
        return result


def check_same_shape(m: IslandMatch) -> None:
    """Refuse a fused addition of a number, or one that broadcasts."""
    require(isinstance(m.other, fx.Node), "the added value is a number", m.output)
    same = m.other.meta["val"].shape == m.root.meta["val"].shape
    require(same, "the added tensor is broadcast", m.output)


def unary_post_op(m: IslandMatch) -> tuple[str, list[Any], str]:
    """oneDNN's name, arguments and algorithm of the fused activation."""
    name = next((name for name in m.fused if name in UNARY), None)
    if name is None:
        return "none", [], "none"
    if name == "relu6":
        low, high = m.captures.get("low", 0.0), m.captures.get("high", 6.0)  # relu6 says its bounds by its name
        return UNARY[name], [float(low), float(high)], ""
    return UNARY[name], [], m.approximate if name == "gelu" else ""
