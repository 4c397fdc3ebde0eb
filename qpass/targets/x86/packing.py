"""Weights packed for oneDNN, as constants that remember what they were packed from; codes made unsigned."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import fx

from qpass.ir.attributes import get_constant
from qpass.ir.constants import expression, form
from qpass.ir.editor import Editor
from qpass.ir.origins import Derived
from qpass.islands.island import IslandMatch, codes_of, quantized_operands

aten = torch.ops.aten
onednn = torch.ops.onednn


def unsigned(codes: fx.Node, dtype: torch.dtype, zero_point: Any, edit: Editor, before: fx.Node) -> tuple[fx.Node, Any]:
    """Signed codes and zero point shifted by 128 into uint8: flipping the top bit of a byte adds 128."""
    if dtype == torch.uint8:
        return codes, zero_point
    place = {"like": codes, "before": before}
    as_bytes = edit.call(aten.view.dtype, codes, torch.uint8, **place)
    shifted = edit.call(aten.bitwise_xor.Scalar, as_bytes, 128, **place)
    if isinstance(zero_point, fx.Node):
        return shifted, edit.call(aten.add.Tensor, zero_point, 128, **place)
    return shifted, zero_point + 128


def pack_linear(m: IslandMatch, edit: Editor, before: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The packed weight, its scales and zero points as nodes; the weight is ``[N, K]``, or ``[K, N]`` on axis 1."""
    transposed = m.operands["w"].axis == 1
    shape = m.x.meta["val"].shape
    hint = None if any(map(is_symbolic, shape)) else [math.prod(shape[:-1]), shape[-1]]

    def pack(codes: torch.Tensor) -> torch.Tensor:
        rows_first = codes.t() if transposed else codes
        return onednn.qlinear_prepack(rows_first.contiguous(), hint)

    return packed(m, pack, ("linear", transposed, str(hint)), edit, before)


def pack_conv(
    m: IslandMatch, x_scale: float, x_zero_point: int, edit: Editor, before: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The packed convolution weight, its scales and zero points as nodes."""
    sizes = m.x.meta["val"].shape
    hint = None if any(map(is_symbolic, sizes)) else [*sizes[:2], *[1] * is_one_dimensional(m), *sizes[2:]]
    shape, groups, one_dimensional = geometry(m), m.groups, is_one_dimensional(m)

    def pack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        image = codes.unsqueeze(2) if one_dimensional else codes
        return onednn.qconv_prepack(image, scale, x_scale, x_zero_point, *shape, groups, hint)

    settings = (one_dimensional, x_scale, x_zero_point, str(shape), groups, str(hint))
    return packed(m, pack, ("conv", *settings), edit, before)


def pack_pixels(m: IslandMatch, edit: Editor, before: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    """The weight ``[O, C, 1, 1]`` of a 1 x 1 convolution packed for a GEMM over pixels."""

    def pack(codes: torch.Tensor) -> torch.Tensor:
        return onednn.qlinear_prepack(codes.flatten(1), None)

    return packed(m, pack, ("pixels",), edit, before)


def packed(
    m: IslandMatch, pack: Callable[..., torch.Tensor], way: Hashable, edit: Editor, before: fx.Node
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Register ``pack(codes[, scale])`` as a constant derived from the weight's codes and scales.

    ``way`` holds all that decides what ``pack`` makes of them: codes packed in the same way are packed once.
    """
    w = quantized_operands(m)["w"]
    codes = codes_of(m, "w")
    inputs = [codes, w.scale][: pack.__code__.co_argcount]
    whole = (way, *map(form, inputs))
    known = edit.derived(whole, like=m.root, before=before)
    if known is not None:
        return known, w.scale, w.zero_point
    parts = [expression(node) for node in inputs]
    sources = tuple(name for names, _ in parts for name in names)

    def compute(*values: torch.Tensor) -> torch.Tensor:
        given, arguments = list(values), []
        for names, part in parts:
            arguments.append(part(*given[: len(names)]))
            del given[: len(names)]
        return pack(*arguments)

    name = f"{str(codes.target) if codes.op == 'get_attr' else codes.name}_packed"
    value = compute(*(get_constant(edit.gm, source) for source in sources))
    node = edit.constant(name, value, like=m.root, before=before, derived=Derived(sources, compute, whole))
    return node, w.scale, w.zero_point


def geometry(m: IslandMatch) -> tuple[list[int], list[int], list[int]]:
    """Stride, padding and dilation of a convolution as numbers; a 1-D one gets a first dimension of one row."""
    kernel = m.w.meta["val"].shape[2:]
    stride, dilation = _spread(m.stride, len(kernel)), _spread(m.dilation, len(kernel))
    if m.padding == "same":
        padding = [step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True)]
    else:
        padding = _spread([0] if m.padding == "valid" else m.padding, len(kernel))
    if is_one_dimensional(m):
        return [1, *stride], [0, *padding], [1, *dilation]
    return stride, padding, dilation


def is_one_dimensional(m: IslandMatch) -> bool:
    """Whether a convolution has one spatial dimension."""
    return bool(m.w.meta["val"].dim() == 3)


def _spread(value: Any, rank: int) -> list[int]:
    return list(value) * rank if len(value) == 1 else list(value)


def is_symbolic(size: Any) -> bool:
    """Whether a size is only known at run time."""
    return not isinstance(size, int)
