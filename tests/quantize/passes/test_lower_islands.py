"""Which kernels take the place of which islands is tested with the patterns; here, how the pass goes about it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import qpass
from interpret import operators
from pass_run import run_once
from pipeline_run import PER_TOKEN, STATIC, Do, kernel_names, records, run_stages
from qpass.errors import StrictError
from qpass.ir.origins import derived_constants
from qpass.ops import graph_ops as ops
from qpass.quantize.passes.carry_codes import CarryCodes
from qpass.quantize.passes.lower_islands import LowerIslands
from qpass.spec.config import Config
from qpass.targets import X86


def quantized(model: nn.Module, *inputs: Tensor, config: Config = STATIC) -> fx.GraphModule:
    prepared = qpass.prepare(model.eval(), inputs, config=config)
    with torch.no_grad():
        prepared(*inputs)
    return qpass.convert(prepared)


def two_linears() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def test_an_island_and_the_rounding_behind_it_become_one_kernel() -> None:
    x = torch.randn(4, 16)
    gm = quantized(two_linears(), x)
    assert operators(gm).splitlines()[2:] == [
        "input_1 = input",
        "quantize_per_tensor = quantize_per_tensor(input_1, s, z, 0, 255, uint8)",
        "dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, s, z, 0, 255, uint8)",
        "linear = linear(dequantize_per_tensor, dequantize_per_channel, 0.bias)",
        "relu = relu(linear)",
        "quantize_per_tensor_1 = quantize_per_tensor(relu, s, z, 0, 255, uint8)",
        "dequantize_per_tensor_1 = dequantize_per_tensor(quantize_per_tensor_1, s, z, 0, 255, uint8)",
        "linear_1 = linear(dequantize_per_tensor_1, dequantize_per_channel_1, 2.bias)",
        "return [linear_1]",
    ]
    assert run_once(LowerIslands(X86), gm, x) == 2
    first = "quantize_per_tensor, s, z, packed(0.weight), 0.bias, s, z, uint8, relu, [], "
    second = "qlinear_pointwise, s, z, packed(2.weight), 2.bias, 1, 0, float32, none, [], none"
    assert operators(gm).splitlines() == [
        "input_1 = input",
        "quantize_per_tensor = quantize_per_tensor(input_1, s, z, 0, 255, uint8)",
        f"qlinear_pointwise = onednn.qlinear_pointwise({first})",
        f"qlinear_pointwise_1 = onednn.qlinear_pointwise({second})",
        "return [qlinear_pointwise_1]",
    ]
    assert kernel_names(gm) == ["onednn.qlinear with relu, quantize", "onednn.qlinear"]


def test_a_packed_weight_knows_what_it_was_packed_from() -> None:
    gm = quantized(nn.Linear(16, 8), x := torch.randn(4, 16))
    LowerIslands(X86).run(gm)
    derived = derived_constants(gm)["weight_codes_packed"]
    assert derived.sources == ("weight_codes",)
    codes = torch.randint(-127, 128, (8, 16), dtype=torch.int8)
    gm.recompile()
    gm.weight_codes_packed = derived.compute(codes)
    gm.graph.eliminate_dead_code()
    other = gm(x)
    gm.weight_codes_packed = derived.compute(gm.weight_codes)
    assert not torch.allclose(other, gm(x))


class Steps(nn.Module):
    """Two linears on one input, over and over: siblings that become one GEMM, in a loop that a trace unrolls."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.gate, self.up, self.count = nn.Linear(8, 8), nn.Linear(8, 8), count

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.count):
            x = self.gate(x).sigmoid() * self.up(x)
        return x


@pytest.mark.parametrize("preset", ["int8_dynamic", "int8_weight_only"])
def test_a_weight_that_every_step_of_a_loop_reads_is_packed_once(preset: str) -> None:
    x = torch.randn(3, 8)
    one, many = (qpass.report(qpass.lower(quantized(Steps(n).eval(), x, config=preset))) for n in (1, 12))  # type: ignore[arg-type]
    assert one.bytes_after == many.bytes_after
    assert one.bytes_before == many.bytes_before


def test_one_weight_packed_in_two_ways_is_two_constants() -> None:
    model = Do(lambda m, x: F.linear(x, m.w).relu() @ m.w, w=nn.Parameter(torch.randn(8, 8)))
    gm = quantized(model, x := torch.randn(3, 8))
    expected = gm(x)
    assert LowerIslands(X86).run(gm).changed == 2
    packed = {str(n.target) for n in gm.graph.find_nodes(op="get_attr") if "packed" in str(n.target)}
    assert len(packed) == 2
    gm.recompile()
    assert torch.allclose(gm(x), expected, atol=float((expected.max() - expected.min()) / 100))  # codes differ at ties


def test_without_kernels_everything_stays_and_says_so() -> None:
    x = torch.randn(4, 16)
    gm = quantized(two_linears(), x)
    before = operators(gm)
    assert run_once(LowerIslands(X86, missing="this machine has none of them"), gm, x) == 0
    assert operators(gm) == before
    found = records(gm)
    assert [(found[op].outcome, found[op].reason) for op in ("linear", "linear 1")] == [
        ("quantized", "this machine has none of them")
    ] * 2


def test_an_island_that_prepare_would_not_have_made_says_why_it_stays() -> None:
    """Another quantizer's graph: scales along the other axis of the weight."""
    gm = quantized(nn.Linear(16, 8), torch.randn(4, 16))
    (dq,) = gm.graph.find_nodes(op="call_function", target=ops.dequantize_per_channel.default)
    dq.update_arg(3, 1)
    assert LowerIslands(X86).run(gm).changed == 0
    assert records(gm)["linear"].reason.startswith("the kernel takes one weight scale per output channel (axis 0)")


def test_strict_turns_what_has_no_kernel_into_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(vars(X86), "missing", lambda: "this machine has none of them")
    gm = quantized(nn.Linear(16, 8), x := torch.randn(4, 16))
    assert torch.equal(qpass.lower(gm)(x), gm(x))  # correct, and in float
    with pytest.raises(StrictError) as refused:
        qpass.lower(gm, strict=True)
    assert refused.value.what == "1 quantized operations have no kernel"
    assert "this machine has none of them" in str(refused.value.where)


def test_a_node_belongs_to_one_island() -> None:
    """``a(x) + b(x)``: each linear could take the sum as its epilogue."""
    r = run_stages(Do(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(16, 8), b=nn.Linear(16, 8)), torch.randn(4, 16))
    assert sorted(kernel_names(r.lowered)) == ["onednn.qlinear", "onednn.qlinear with add"]


def test_a_dead_linear() -> None:
    """A fault of the nearest relative: a linear that nobody reads crashes its annotation."""

    def forward(m: Any, x: Tensor) -> Tensor:
        m.dead(x)
        return m.alive(x)

    r = run_stages(Do(forward, dead=nn.Linear(16, 8), alive=nn.Linear(16, 8)), torch.randn(4, 16))
    assert kernel_names(r.lowered) == ["onednn.qlinear"]
    assert not any(name.startswith("dead") for name, _ in r.quantized.named_buffers())


def test_rounding_twice_between_islands_is_rounding_once() -> None:
    layers = {"a": nn.Linear(16, 8), "b": nn.Linear(8, 4)}
    model = Do(lambda m, x: m.b(F.relu(m.a(x)).unflatten(-1, (2, 4)).flatten(-2)), **layers)
    x = torch.randn(4, 16)
    gm = quantized(model, x, config=STATIC)
    CarryCodes().run(gm)
    assert run_once(LowerIslands(X86), gm, x) == 2
    assert kernel_names(gm)[0] == "onednn.qlinear with relu, quantize"


def test_regions_are_lowered_too() -> None:
    """A fault of the nearest relative: what runs under ``cond`` or ``no_grad`` is left in float without a word."""

    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = m.a(x)
        return torch.cond(x.sum() > 0, lambda y: m.b(y), lambda y: m.c(y).relu(), (x,))

    model = Do(forward, a=nn.Linear(8, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8)).eval()
    inputs = [s * torch.randn(4, 8).abs() for s in (1, -1)]
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(8))  # so that either sign takes its own branch
        model.a.bias.zero_()
        prepared = qpass.prepare(model, (inputs[0],), config=STATIC)
        for x in inputs:
            assert torch.equal(prepared(x), model(x))
        lowered = qpass.lower(qpass.convert(prepared))
        graphs = [lowered, lowered.true_graph_0, lowered.false_graph_0]
        assert [kernel_names(gm) for gm in graphs] == [
            ["onednn.qlinear"], ["onednn.qlinear"], ["onednn.qlinear with relu"],
        ]  # fmt: skip
        for x in inputs:
            expected = model(x)
            assert (lowered(x) - expected).norm() < 0.05 * expected.norm()  # 8 bits, twice


def test_per_token_codes_of_one_input_serve_all() -> None:
    r = run_stages(Do(lambda m, x: (torch.relu(m.a(x)), torch.tanh(m.b(x))), a=nn.Linear(16, 8), b=nn.Linear(16, 8)),
             torch.randn(4, 16), config=PER_TOKEN)  # fmt: skip
    assert operators(r.lowered).count("= quantize_per_token(") == 1
