"""Lowering is exact, kernel by kernel: fed the codes of the reference graph, a kernel writes the reference's codes.

Whole models are compared one kernel at a time, because a code that falls differently at a rounding tie is amplified by
the layers behind it, until the ends of two correct graphs differ. So both graphs run side by side, and every kernel of
the lowered one reads the reference's values.

How equal is equal? A kernel sums products of codes in int32, exactly, and rounds a handful of times after that; the
reference multiplies float32 values and rounds at every step. So each island is computed a third time, in float64 from
the same codes, as the judge of both. With ``m`` the sum of the magnitudes of all terms and ``u = 2**-24``:

- a kernel's float result lies within ``8 u m`` of the judge's (conversion, two scales, bias, sum, the activation);
- where rows of bfloat16 meet a weight of codes, the sum of products is rounded to bfloat16 and added up in float32, so
  ``2**-8`` of that sum and ``K u m`` come on top;
- codes are equal, except where the judge's value lies within both errors, ``8 u m + (K + 8) u m`` for a reference that
  adds K products, of the point where two codes meet; there they may differ by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from interpret import copied, values
from qpass.ir.module import copy_graph_module
from qpass.ir.pipeline import Pipeline
from qpass.ir.text import target_name
from qpass.islands.qdq import QdqNode, as_dequantize, as_quantize, cast_of
from qpass.quantize.passes.annotate import ISLAND
from qpass.quantize.passes.assign_compute_dtype import ROWS
from qpass.quantize.passes.carry_codes import CarryCodes
from qpass.quantize.pipelines import lower_pipeline
from qpass.spec import PerChannel, PerGroup
from qpass.targets import X86

aten = torch.ops.aten
U = 2.0**-24
KERNEL = 8
SLOPE = 1.5
"""The steepest of the fused activations is hardswish; it stretches an error by this much."""
ACTIVATIONS = {
    aten.relu.default, aten.gelu.default, aten.silu.default, aten.hardswish.default, aten.hardtanh.default,
    aten.relu6.default,
}  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """One result of a kernel against the reference: how many values, how many differ, and the kernel's name."""

    kernel: str
    count: int
    differing: int


def compare_kernels(quantized: fx.GraphModule, *inputs: Tensor) -> list[Compared]:
    """Every kernel that ``quantized`` is lowered to, compared with the q/dq graph; AssertionError names the node.

    Skips the test on a machine without the kernels.
    """
    if X86.missing():
        pytest.skip(X86.missing())
    reference = copy_graph_module(quantized)
    Pipeline("quantized", (CarryCodes(),)).run(reference)
    known = values(reference, *inputs)
    lowered = copy_graph_module(reference)
    stands_for: dict[str, str] = {}
    lowered._register_replace_node_hook(lambda old, new, user: stands_for.update({new: old.name}))
    lower_pipeline(X86).run(lowered)
    follower = _Follower(lowered, {node.name: value for node, value in known.items()}, stands_for)
    with torch.no_grad():
        follower.run(*inputs)
    judge = _Judge(known)
    originals = {node.name: node for node in reference.graph.nodes}
    return [judge.compare(kernel, originals[name], value) for kernel, name, value in follower.results]


class _Follower(fx.Interpreter):
    """Runs the lowered graph on the reference's values, and keeps what new nodes compute in the place of old ones."""

    def __init__(self, gm: fx.GraphModule, known: dict[str, Any], stands_for: dict[str, str]) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.known = known
        self.stands_for = {new: old for new, old in stands_for.items() if old in known}
        self.fresh: set[fx.Node] = set()
        self.results: list[tuple[str, str, Tensor]] = []

    def run_node(self, n: fx.Node) -> Any:
        if n.op in ("placeholder", "get_attr", "output"):
            return super().run_node(n)
        if n.name in self.known:
            assert not self.fresh.intersection(n.all_input_nodes), f"{n.name} reads a value that nothing has checked"
            return copied(self.known[n.name])
        result = super().run_node(n)
        old = self.stands_for.get(n.name)
        if old is None:
            self.fresh.add(n)
            return result
        self.results.append((target_name(n), old, result))
        return copied(self.known[old])


class _Judge:
    """The islands of the reference in float64, and the sums of the magnitudes of their terms."""

    def __init__(self, known: dict[fx.Node, Any]) -> None:
        self.known = known
        self.exact: dict[fx.Node, Tensor] = {}
        self.magnitude: dict[fx.Node, Tensor] = {}
        self.products: dict[fx.Node, int] = {}
        self.rounded_sums: dict[fx.Node, Tensor] = {}
        for node in known:
            if as_dequantize(node) is not None:
                self.exact[node] = _dequantized(as_dequantize(node), known)
                self.magnitude[node] = self.exact[node].abs()
            elif node.op == "call_function" and ISLAND in node.meta and as_quantize(node) is None:
                self._judge(node)

    def _judge(self, node: fx.Node) -> None:
        self.products[node] = self._longest_sum(node)
        self.exact[node] = self._run(node, self.exact, lambda x: x)
        if node.target in ACTIVATIONS:
            self.magnitude[node] = self.magnitude[node.args[0]] * SLOPE
        else:
            self.magnitude[node] = self._run(node, self.magnitude, torch.abs)
        rows = cast_of(node.args[ROWS[node.target][0]], torch.float32) if node.target in ROWS else None
        if rows is not None and self.known[rows].dtype == torch.bfloat16:
            self.rounded_sums[node] = self._without_bias(node).abs()

    def _without_bias(self, node: fx.Node) -> Tensor:
        place = 0 if node.target is aten.addmm.default else 2
        bias = node.args[place] if len(node.args) > place and isinstance(node.args[place], fx.Node) else None
        return self.exact[node] if bias is None else self.exact[node] - self.known[bias].double()

    def _run(self, node: fx.Node, table: dict[fx.Node, Tensor], absolute: Callable[[Tensor], Tensor]) -> Tensor:
        def value(source: fx.Node) -> Any:
            found = self.known[source]
            if source in table:
                return table[source]
            return absolute(found.double()) if isinstance(found, Tensor) and found.is_floating_point() else found

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        with torch.no_grad():
            return node.target(*args, **kwargs)

    def _longest_sum(self, node: fx.Node) -> int:
        before = [self.products.get(source, 0) for source in node.all_input_nodes]
        weight = next((s for s in node.all_input_nodes[1:] if s in self.exact and self.exact[s].dim() > 1), None)
        return max([*before, self.exact[weight][0].numel() if weight is not None else 1])

    def compare(self, kernel: str, node: fx.Node, result: Tensor) -> Compared:
        known = self.known[node]
        assert result.dtype == known.dtype, f"{kernel} writes {result.dtype} for {node.name}"
        assert result.shape == known.shape, f"{kernel} writes {list(result.shape)} for {node.name}"
        differs = result != known
        pair, cast = as_quantize(node), cast_of(node)
        source = pair.value if pair is not None else cast if cast is not None else node
        source = source if source in self.exact else node
        if not differs.any() or source not in self.exact:
            assert not differs.any(), f"{kernel} differs from {node.name}, which it must repeat"
            return Compared(kernel, result.numel(), 0)
        exact, magnitude = self.exact[source], self.magnitude[source]
        own = KERNEL + (self.products[source] if source in self.rounded_sums else 0)
        if pair is not None:
            both = (own + self.products[source] + 8) * U * magnitude / pair.qparams.scale
            self._codes_meet(kernel, node, result, exact / pair.qparams.scale, both, differs)
        else:
            step = torch.finfo(result.dtype).eps / 2 if result.dtype != torch.float32 else 0.0
            bound = own * U * magnitude + step * exact.abs() + 2.0**-8 * self.rounded_sums.get(source, 0.0)
            worst = ((result.double() - exact).abs() / bound.clamp(min=1e-300)).max()
            assert worst <= 1, f"{kernel} is {worst:.2f} of its bound away from {node.name}"
        return Compared(kernel, result.numel(), int(differs.sum()))

    def _codes_meet(
        self, kernel: str, node: fx.Node, codes: Tensor, steps: Tensor, error: Tensor, differs: Tensor
    ) -> None:
        apart = (codes.int() - self.known[node].int()).abs()
        assert apart.max() <= 1, f"{kernel} is {apart.max()} codes away from {node.name}"
        from_tie = (steps - steps.floor() - 0.5).abs()
        worst = (from_tie / error.clamp(min=1e-300))[differs].max()
        assert worst <= 1, f"{kernel} rounds {node.name} differently, {worst:.1f} times its error away from a tie"


def _dequantized(pair: QdqNode | None, known: dict[fx.Node, Any]) -> Tensor:
    assert pair is not None
    codes, qparams = known[pair.value].double(), pair.qparams
    scale, zero_point = (
        known[q].double() if isinstance(q, fx.Node) else torch.tensor(0.0 if q is None else q, dtype=torch.float64)
        for q in (qparams.scale, qparams.zero_point)
    )
    if isinstance(qparams.granularity, PerChannel):
        shape = [1] * codes.dim()
        shape[qparams.granularity.axis] = -1
        scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    if isinstance(qparams.granularity, PerGroup):
        rows = codes.reshape(-1, qparams.granularity.group_size)
        return ((rows - zero_point.reshape(-1, 1)) * scale.reshape(-1, 1)).reshape(codes.shape)
    return (codes - zero_point) * scale
