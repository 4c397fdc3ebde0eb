"""Products of float rows with a weight that is stored as int8 codes, one scale per output channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.ir.editor import Editor
from qpass.ir.rule import Refusal, require
from qpass.islands.island import IslandMatch, Specs, codes_of, quantized_operands, uncast
from qpass.islands.qdq import cast_of
from qpass.spec import PerChannel
from qpass.targets.generic.loops import DequantizedWeight
from qpass.targets.target import Kernel, Output
from qpass.targets.x86.instructions import bfloat16_is_fast
from qpass.targets.x86.linear import check_weight
from qpass.targets.x86.packing import is_symbolic, packed

aten = torch.ops.aten

FEW_ROWS = 8
"""Up to so many rows a product waits for its weight, and reading codes alone is fastest; for more, the arithmetic
decides, and oneDNN's is faster than that of the packed kernel even after a cast of all codes."""
VECTOR = 16
"""The packed kernel reads rows in vectors of 16 values, beyond the end of a row of another length."""
BLOCK = 2**21
"""Codes that are cast at a time: 4 MiB of bfloat16, which the product finds in the cache."""
MOST_BLOCKS = 64
"""Larger weights are cast in larger blocks, so that the graph stays small."""


def check_rows(m: IslandMatch) -> None:
    """Refuse rows that the kernels of bfloat16 do not read, and CPUs on which they do not pay."""
    rows = cast_of(m.x, torch.float32)
    rounded = rows is not None and rows.meta["val"].dtype == torch.bfloat16
    require(rounded, "its rows are not rounded to bfloat16")
    require(bfloat16_is_fast(), "this CPU has no instructions for bfloat16")


def count_rows(m: IslandMatch) -> int:
    """The rows of the product; those of the example where the number is only known at run time."""
    from torch.fx.experimental.symbolic_shapes import optimization_hint

    return int(optimization_hint(math.prod(m.x.meta["val"].shape[:-1])))


class Bfloat16Rows(Kernel):
    """``linear(to(x, float32), dq(w), b) -> to(x @ w^T, float32) * scale + b``, ``x`` bfloat16 and ``w`` codes

    The product is summed in float32 and rounded to bfloat16, by at most ``2**-8`` of it: the bound on how far the
    result is from the reference. All codes are exact in bfloat16; the scales are applied after that, in float32.
    """

    def check(self, m: IslandMatch, specs: Specs) -> None:
        require("x" not in specs, "the activation is quantized")
        check_weight(m, specs.get("w"))
        check_rows(m)

    def note(self, m: IslandMatch) -> str:
        dynamic = any(map(is_symbolic, m.x.meta["val"].shape[:-1]))
        return f"chosen for about {count_rows(m)} rows, as in the example" if dynamic else ""

    def emit(self, m: IslandMatch, out: Output, edit: Editor) -> fx.Node:
        val, axis = m.x.meta["val"], m.operands["w"].axis
        count, columns = m.w.meta["val"].shape[axis], m.w.meta["val"].shape[1 - axis]
        place = {"like": m.root, "before": out.node}
        rows = uncast(m.x)
        if val.dim() != 2:
            rows = edit.call(aten.reshape.default, rows, [-1, columns], **place)
        result = self.multiply(m, rows, edit, place)
        result = edit.call(aten.to.dtype, result, torch.float32, **place)
        result = edit.call(aten.mul.Tensor, result, quantized_operands(m)["w"].scale, **place)
        if val.dim() != 2:
            sizes = [edit.call(aten.sym_size.int, m.x, d, **place) if is_symbolic(s) else s
                     for d, s in enumerate(val.shape[:-1])]  # fmt: skip
            result = edit.call(aten.reshape.default, result, [*sizes, count], **place)
        if m.b is not None:
            result = edit.call(aten.add.Tensor, result, m.b, **place)
        return result

    def multiply(self, m: IslandMatch, rows: fx.Node, edit: Editor, place: Any) -> fx.Node:
        """``[M, K]`` bfloat16 times the transposed codes as bfloat16 ``[M, N]``."""
        raise NotImplementedError


class PackedCodes(Bfloat16Rows):
    """``x @ w^T -> _weight_int8pack_mm(x, w, 1)``, for few rows

    The operator reads whole vectors from addresses that are multiples of their size, without a check. So it gets a
    copy of the rows, which Inductor takes for no view of anything, and codes that are copied where they lie elsewhere.
    """

    name = "aten._weight_int8pack_mm"

    def check(self, m: IslandMatch, specs: Specs) -> None:
        super().check(m, specs)
        require(count_rows(m) <= FEW_ROWS, f"the kernel is slow for more than {FEW_ROWS} rows")
        columns = m.w.meta["val"].shape[1 - m.operands["w"].axis]
        require(columns % VECTOR == 0, f"the kernel takes rows of a multiple of {VECTOR} values")

    def multiply(self, m: IslandMatch, rows: fx.Node, edit: Editor, place: Any) -> fx.Node:
        axis = m.operands["w"].axis
        columns = m.w.meta["val"].shape[1 - axis]

        def aligned(codes: torch.Tensor) -> torch.Tensor:
            rows_first = (codes.t() if axis == 1 else codes).contiguous()
            return rows_first if rows_first.data_ptr() % 64 == 0 else rows_first.clone()

        codes, scale, _ = packed(m, aligned, ("aligned", axis), edit, place["before"])
        ones = edit.call(aten.ones_like.default, scale, dtype=torch.bfloat16, **place)
        longer = edit.call(aten.constant_pad_nd.default, rows, [0, 0, 0, 1], **place)  # a clone Inductor would remove
        rows = edit.call(aten.slice.Tensor, longer, 0, 0, -1, **place)
        # the kernel refuses other rows, and Inductor, free to choose a layout, forgets a mere contiguous()
        rows = edit.call(torch_private.force_stride_order, rows, [columns, 1], **place)
        return edit.call(aten._weight_int8pack_mm.default, rows, codes, ones, **place)


class CastCodes(Bfloat16Rows):
    """``x @ w^T -> cat([mm(x, to(part, bfloat16)^T) for part in w])``: the codes are cast part by part."""

    name = "aten.mm (codes cast to bfloat16)"

    def multiply(self, m: IslandMatch, rows: fx.Node, edit: Editor, place: Any) -> fx.Node:
        axis, codes = m.operands["w"].axis, codes_of(m, "w")
        count, columns = m.w.meta["val"].shape[axis], m.w.meta["val"].shape[1 - axis]
        blocks = min(math.ceil(count * columns / BLOCK), MOST_BLOCKS, count)
        size = math.ceil(count / max(blocks, 1))
        parts = []
        for start in range(0, count, size):
            part = codes
            if size < count:
                part = edit.call(aten.slice.Tensor, codes, axis, start, min(start + size, count), **place)
            part = edit.call(aten.to.dtype, part, torch.bfloat16, **place)
            part = edit.call(aten.t.default, part, **place) if axis == 0 else part
            parts.append(edit.call(aten.mm.default, rows, part, **place))
        return edit.call(aten.cat.default, parts, -1, **place) if len(parts) > 1 else parts[0]


class DequantizedRows(DequantizedWeight):
    """``linear(x, dq(w), b)`` as it stands, and the report says why it is slow"""

    def note(self, m: IslandMatch) -> str:
        if not isinstance(quantized_operands(m)["w"].granularity, PerChannel):
            return ""
        try:
            check_rows(m)
        except Refusal as refusal:
            return f"slower than in float: {refusal.reason}"
        return ""
