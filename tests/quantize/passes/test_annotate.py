from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from pass_run import run_once
from pipeline_run import PER_TOKEN, STATIC, WEIGHT_ONLY, Do, records
from qpass.capture.export import capture
from qpass.ir.match import Matcher
from qpass.ir.regions import regions
from qpass.quantize.passes.annotate import EDGES, FOLD, ISLAND, Annotate
from qpass.spec.config import Config
from qpass.targets import X86


def annotated(model: nn.Module, *inputs: Tensor, config: Config = STATIC) -> fx.GraphModule:
    gm = capture(model.eval(), inputs)
    run_once(Annotate(config, X86), gm, *inputs)
    return gm


def edges(gm: fx.GraphModule) -> dict[str, dict[str, Any]]:
    """consumer -> {source: spec}."""
    return {n.name: {s.name: spec for s, spec in n.meta[EDGES].items()} for n in gm.graph.nodes if EDGES in n.meta}


def block(m: Any, x: Tensor) -> Tensor:
    return m.fc(torch.relu(m.norm(m.conv(x))).flatten(1))


def conv_net() -> nn.Module:
    return Do(block, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), fc=nn.Linear(144, 5))


def test_edges_islands_and_records() -> None:
    gm = annotated(conv_net(), torch.randn(2, 3, 8, 8))
    weight, activation = STATIC.weight, STATIC.activation
    assert edges(gm) == {
        "conv2d": {"inputs_0": activation, "conv_weight": weight},
        "linear": {"flatten": activation, "fc_weight": weight},
    }
    assert {n.name: n.meta[ISLAND] for n in gm.graph.nodes if ISLAND in n.meta} == {
        "conv2d": "conv", "batch_norm": "conv", "relu": "conv", "linear": "linear",
    }  # fmt: skip
    assert [n.name for n in gm.graph.nodes if n.meta.get(FOLD)] == ["batch_norm"]
    found = {op: (record.outcome, record.reason, record.module) for op, record in records(gm).items()}
    assert found == {
        "conv2d": ("quantized", "", "conv"),
        "batch_norm": ("quantized", "fused into conv2d", "norm"),
        "relu": ("quantized", "fused into conv2d", ""),
        "flatten.using_ints": ("exact", "", ""),
        "linear": ("quantized", "", "fc"),
    }


def test_nothing_but_meta_changes_and_the_count_is_the_islands() -> None:
    gm, x = capture(conv_net().eval(), (torch.randn(2, 3, 8, 8),)), torch.randn(2, 3, 8, 8)
    nodes, before = list(gm.graph.nodes), gm(x)
    assert run_once(Annotate(STATIC, X86), gm, x) == 2
    assert list(gm.graph.nodes) == nodes
    assert torch.equal(gm(x), before)


def test_the_channel_axis_is_the_operand_s_own() -> None:
    model = Do(lambda m, x: x @ m.w, w=nn.Parameter(torch.randn(4, 8)))
    (specs,) = edges(annotated(model, torch.randn(3, 4))).values()
    assert specs["w"].granularity.axis == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (STATIC.keep_float(module="fc"), "override 0 of the configuration leaves it in float"),
        (STATIC.keep_float(op="linear"), "override 0 of the configuration leaves it in float"),
        (STATIC.keep_float(module_type=nn.Linear), "override 0 of the configuration leaves it in float"),
        (Config(), "the configuration quantizes none of its operands"),
    ],
)
def test_what_the_configuration_leaves_alone_says_so_and_was_not_asked_for(config: Config, expected: str) -> None:
    record = records(annotated(conv_net(), torch.randn(2, 3, 8, 8), config=config))["linear"]
    assert (record.outcome, record.reason, record.asked, record.is_missed) == ("float", expected, False, False)


def test_what_was_asked_for_and_cannot_be_done_is_missed() -> None:
    record = records(annotated(conv_net(), torch.randn(2, 3, 8, 8), config=PER_TOKEN))["conv2d"]
    assert record.reason == "qconv takes one static activation scale per tensor"
    assert record.asked
    assert record.is_missed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("config", [STATIC, PER_TOKEN, WEIGHT_ONLY])
def test_float32_alone_is_quantized(config: Config, dtype: torch.dtype) -> None:
    gm = annotated(nn.Linear(4, 4).to(dtype), torch.randn(3, 4, dtype=dtype), config=config)
    name = str(dtype).removeprefix("torch.")
    record = records(gm)["linear"]
    assert record.reason == f"it computes in {name}; float32 is quantized: model.float() makes it so"
    assert (record.outcome, record.is_missed) == ("float", True)


def test_an_operation_under_autocast_is_left_to_it() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return m.a(x)

    gm = capture(Do(forward, a=nn.Linear(4, 4)).eval(), (torch.randn(3, 4),))
    reasons = []
    for region in regions(gm):
        Annotate(STATIC, X86).run(region)
        reasons += [record.reason for record in records(region).values() if record.op == "linear"]
    assert reasons == ["torch.autocast in the model computes it in bfloat16, and float32 is quantized"]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_numbers_are_not_quantized(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    gm = annotated(nn.Linear(4, 4, dtype=dtype), torch.randn(3, 4, dtype=dtype))
    assert records(gm)["linear"].reason == f"it computes in {name}, and complex numbers are not quantized"


def test_weights_are_not_rounded_without_a_spec_for_weights() -> None:
    """Rounding activations alone would lose precision and gain no kernel."""
    gm = annotated(conv_net(), torch.randn(2, 3, 8, 8), config=Config(activation=STATIC.activation))
    assert edges(gm) == {}


def test_weight_only_rounds_no_activation() -> None:
    gm = annotated(conv_net(), torch.randn(2, 3, 8, 8), config=WEIGHT_ONLY)
    assert edges(gm) == {"linear": {"fc_weight": WEIGHT_ONLY.weight}}


def test_overrides_are_held_against_every_operation() -> None:
    step = Annotate(STATIC.keep_float(op="tanh"), X86)
    gm = capture(Do(lambda m, x: torch.tanh(m.fc(x)), fc=nn.Linear(4, 4)), (torch.randn(2, 4),))
    (seen,) = step.run(gm).found
    assert seen.overrides == {0}
    assert {"linear", "tanh"} <= seen.ops
    assert seen.paths["fc"] == "torch.nn.modules.linear.Linear"


def test_sizes_and_checks_of_inputs_have_no_record() -> None:
    found = records(annotated(Do(lambda m, x: m.fc(x.view(x.shape[0], -1)), fc=nn.Linear(4, 4)), torch.randn(3, 2, 2)))
    assert set(found) == {"view", "linear"}


class Blocks(nn.Module):
    """``relu(linear(x) + x)``, again and again: every linear has a chain behind it that leads to the next."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x) + x)
        return x


def test_annotation_is_linear_in_linear_add_relu_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted, not timed: attempts to match a pattern at a node."""
    attempts: list[int] = []
    match = Matcher.match
    monkeypatch.setattr(Matcher, "match", lambda *args, **options: attempts.append(1) or match(*args, **options))

    def count(blocks: int) -> int:
        gm = capture(Blocks(blocks).eval(), (torch.randn(2, 4),))
        attempts.clear()
        assert Annotate(STATIC, X86).run(gm).changed == blocks
        return len(attempts)

    few, many = count(10), count(40)
    # The graph has a fixed part (checks of the input) of 4 nodes, so four times the blocks cost at most four times.
    assert 3 * few < many <= 4 * few
