"""x86 CPUs: oneDNN's int8 convolutions."""

from __future__ import annotations

import torch
from torch import fx

from qpass.ir.editor import Editor
from qpass.ir.rule import require
from qpass.islands.island import IslandMatch, Specs, codes_of, quantized_operands
from qpass.islands.views import carried
from qpass.spec import PerTensor
from qpass.targets.target import Kernel, Output
from qpass.targets.x86.linear import check_activation, check_same_shape, check_weight, requantized_output, unary_post_op
from qpass.targets.x86.packing import geometry, is_one_dimensional, pack_conv, pack_pixels, unsigned

aten = torch.ops.aten
onednn = torch.ops.onednn

CONV_FUSIONS = frozenset({(), ("relu",), ("silu",), ("hardswish",), ("relu6",)})
CONV_ADD_FUSIONS = frozenset({("add",), ("add", "relu")})


class Qconv(Kernel):
    """``act(conv(dq(x), dq(w), b)) -> onednn.qconv_pointwise``: 1-D to 3-D, grouped and depthwise, static.

    A 1-D convolution runs as a 2-D one on images of one row: the 1-D kernel fuses less, and torch's shape function is
    wrong about it.
    """

    name = "onednn.qconv"
    fusions = CONV_FUSIONS

    def check(self, m: IslandMatch, specs: Specs) -> None:
        check_activation(specs.get("x"))
        per_tensor = isinstance(specs["x"].granularity, PerTensor) and not specs["x"].dynamic
        require(per_tensor, "qconv takes one static activation scale per tensor")
        check_weight(m, specs.get("w"))
        rank = m.w.meta["val"].dim()
        require(m.x.meta["val"].dim() == rank, "qconv takes batched input")
        require(rank < 5 or not m.fused, "the three-dimensional kernel fuses nothing")

    def output(self, m: IslandMatch) -> Output:
        return requantized_output(m)

    def emit(self, m: IslandMatch, out: Output, edit: Editor) -> fx.Node:
        x = quantized_operands(m)["x"]
        codes, zero_point = unsigned(codes_of(m, "x"), x.dtype, x.zero_point, edit, out.node)
        place = {"like": m.output, "before": out.node}
        weight = pack_conv(m, x.scale, zero_point, edit, out.node)
        result = edit.call(
            onednn.qconv_pointwise.default, as_image(codes, m, edit, out.node), x.scale, zero_point, *weight, m.b,
            *geometry(m), m.groups, out.scale, out.zero_point, out.dtype, *unary_post_op(m), **place,
        )  # fmt: skip
        return edit.call(aten.squeeze.dim, result, 2, **place) if is_one_dimensional(m) else result


class QconvAdd(Qconv):
    """``relu(conv(dq(x), dq(w), b) + dq(other)) -> onednn.qconv2d_pointwise.binary``, in ``other``'s memory."""

    name = "onednn.qconv (add)"
    fusions = CONV_ADD_FUSIONS

    def check(self, m: IslandMatch, specs: Specs) -> None:
        super().check(m, specs)
        require(m.x.meta["val"].dim() < 5, "the kernel that adds is two-dimensional")
        other = specs.get("other")
        require(other is not None and not other.dynamic, "the added tensor has no static codes")
        require(other.dtype == torch.uint8, "the added tensor's codes are not uint8")  # type: ignore[union-attr]
        check_same_shape(m)

    def output(self, m: IslandMatch) -> Output:
        out = requantized_output(m)
        require(out.dtype == torch.uint8, "the kernel that adds writes codes, and nothing rounds its result")
        return out

    def emit(self, m: IslandMatch, out: Output, edit: Editor) -> fx.Node:
        quantized = quantized_operands(m)
        x, other = quantized["x"], quantized["other"]
        codes, zero_point = unsigned(codes_of(m, "x"), x.dtype, x.zero_point, edit, out.node)
        weight = pack_conv(m, x.scale, zero_point, edit, out.node)
        place = {"like": m.output, "before": out.node}
        fresh = aten.contiguous.default if may_overwrite(codes_of(m, "other"), m) else aten.clone.default
        accumulator = as_image(codes_of(m, "other"), m, edit, out.node)
        accumulator = edit.call(fresh, accumulator, memory_format=torch.channels_last, **place)
        unary = "relu" if "relu" in m.fused else "none"
        result = edit.call(
            onednn.qconv2d_pointwise.binary, as_image(codes, m, edit, out.node), x.scale, zero_point, *weight,
            accumulator, m.b, *geometry(m), m.groups, out.scale, out.zero_point, out.dtype, other.scale,
            other.zero_point, "sum", 1.0, unary, [], "", **place,
        )  # fmt: skip
        return edit.call(aten.squeeze.dim, result, 2, **place) if is_one_dimensional(m) else result


class PixelGemmAdd(QconvAdd):
    """``relu(conv1x1(dq(x), dq(w), b) + dq(other)) -> onednn.qlinear_pointwise.binary`` over the pixels as rows.

    A 1 x 1 convolution of a channels-last image is a GEMM, and the GEMM adds in ``other``'s memory where the
    convolution works on a copy.
    """

    name = "onednn.qlinear (pixels, add)"

    def check(self, m: IslandMatch, specs: Specs) -> None:
        super().check(m, specs)
        sizes = m.w.meta["val"].shape[2:]
        stride, padding, _ = geometry(m)
        plain = tuple(sizes) == (1, 1) and set(stride) == {1} and set(padding) == {0} and m.groups == 1
        require(plain, "only a 1 x 1 convolution without stride is a GEMM over the pixels")

    def emit(self, m: IslandMatch, out: Output, edit: Editor) -> fx.Node:
        quantized = quantized_operands(m)
        x, other = quantized["x"], quantized["other"]
        place = {"like": m.output, "before": out.node}
        codes, zero_point = unsigned(codes_of(m, "x"), x.dtype, x.zero_point, edit, out.node)
        weight = pack_pixels(m, edit, out.node)
        fresh = aten.contiguous.default if may_overwrite(codes_of(m, "other"), m) else aten.clone.default
        pixels = edit.call(aten.permute.default, codes, [0, 2, 3, 1], **place)
        accumulator = edit.call(aten.permute.default, codes_of(m, "other"), [0, 2, 3, 1], **place)
        accumulator = edit.call(fresh, accumulator, memory_format=torch.contiguous_format, **place)
        unary = "relu" if "relu" in m.fused else "none"
        result = edit.call(
            onednn.qlinear_pointwise.binary, pixels, x.scale, zero_point, *weight, accumulator, m.b, out.scale,
            out.zero_point, out.dtype, other.scale, other.zero_point, "sum", 1.0, unary, [], "", **place,
        )  # fmt: skip
        return edit.call(aten.permute.default, result, [0, 3, 1, 2], **place)


def as_image(codes: fx.Node, m: IslandMatch, edit: Editor, before: fx.Node) -> fx.Node:
    """The codes ``[B, C, L]`` of a 1-D convolution as ``[B, C, 1, L]``; all others as they are."""
    if not is_one_dimensional(m):
        return codes
    return edit.call(aten.unsqueeze.default, codes, 2, like=m.root, before=before)


def may_overwrite(codes: fx.Node, m: IslandMatch) -> bool:
    """Whether a kernel standing at ``m.output`` may write into ``codes``: fresh memory that nothing reads later."""
    if codes.op != "call_function" or carried(codes):
        return False
    readers = [user for user in codes.users if user is not m.other]
    dq_readers = list(m.other.users)
    return all(user < m.output for user in readers) and len(dq_readers) == 1 and not any(map(carried, readers))
