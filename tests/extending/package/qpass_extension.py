"""What another package adds to qpass without an edit in it: an island, kernels, targets, a pass and an observer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

import qpass
from qpass.passes import Editor, Pass, PassResult
from qpass.patterns import ACTIVATION, Island, Linear, aten, codes_of, quantized_operands, require
from qpass.targets import X86, Kernel, Output, Target

OPS = torch.ops.aten


class Addcmul(Island):
    """addcmul(dq(x), dq(a), dq(b))  ->  qpass_extension::addcmul(x, a, b)"""

    name = "addcmul"
    operands = {"x": ACTIVATION, "a": ACTIVATION, "b": ACTIVATION}

    def pattern(self, x: Any, a: Any, b: Any) -> Any:
        return aten.addcmul(x, a, b)


@torch.library.custom_op("qpass_extension::addcmul", mutates_args=())
def addcmul(codes: list[Tensor], scales: list[float], zero_points: list[int]) -> Tensor:
    """``x + a * b`` of float32, from the codes of the three."""
    parts = zip(codes, scales, zero_points, strict=True)
    x, a, b = ((code.to(torch.float32) - zero_point) * scale for code, scale, zero_point in parts)
    return torch.addcmul(x, a, b)


@addcmul.register_fake
def _(codes: list[Tensor], scales: list[float], zero_points: list[int]) -> Tensor:
    return torch.addcmul(*(code.to(torch.float32) for code in codes))


class AddcmulOfCodes(Kernel):
    """Reads the codes of all three operands."""

    name = "qpass_extension.addcmul"

    def check(self, m: Any, specs: Any) -> None:
        for name in ("x", "a", "b"):
            require(name in specs and not specs[name].dynamic, f"{name} has no static scale")

    def emit(self, m: Any, out: Output, edit: Editor) -> fx.Node:
        found = quantized_operands(m)
        parts = [(codes_of(m, name), found[name].scale, found[name].zero_point) for name in ("x", "a", "b")]
        operator = torch.ops.qpass_extension.addcmul.default
        return edit.call(operator, *(list(part) for part in zip(*parts, strict=True)), like=m.root, before=out.node)


class LinearInFloat(Kernel):
    """Leaves a linear between its q/dq pairs, and takes no epilogue."""

    name = "toy.linear"

    def check(self, m: Any, specs: Any) -> None:
        require("w" in specs, "the weight is not quantized")

    def emit(self, m: Any, out: Output, edit: Editor) -> fx.Node:
        return m.output


EXTENDED = X86.with_kernels({Addcmul: (AddcmulOfCodes(),)}, name="x86_with_addcmul")
TOY = Target("toy", device="cpu", kernels={Linear: (LinearInFloat(),), Addcmul: (AddcmulOfCodes(),)})


@dataclass(frozen=True)
class ClampInputs(Pass):
    """``linear(x, w, b)  ->  linear(clamp(x, -limit, limit), w, b)``, which is inexact for larger values"""

    limit: float

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit, count = Editor(gm, self.name), 0
        for node in gm.graph.find_nodes(op="call_function", target=OPS.linear.default):
            x = node.args[0]
            if x.target is not OPS.clamp.default:
                clamped = edit.call(OPS.clamp.default, x, -self.limit, self.limit, like=node, before=node)
                node.replace_input_with(x, clamped)
                count += 1
        return PassResult(count, (f"{count} inputs are clamped to {self.limit}",), ("the bias: it is not clamped",))


class HalfRange(qpass.observer.MinMaxObserver):
    """Half of the range that was seen."""

    def chosen_range(self) -> tuple[Tensor, Tensor]:
        low, high = super().chosen_range()
        return low / 2, high / 2
