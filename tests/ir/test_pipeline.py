from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from interpret import operators
from pipeline_run import STATIC, Do, run_stages
from qpass.capture.export import capture
from qpass.errors import ConfigError, ConvertError, InputError, VerifyError
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.module import copy_graph_module, rebuild
from qpass.ir.pipeline import PassRun, Pipeline
from qpass.ir.record import Stage, graph_record
from qpass.ir.text import target_name
from qpass.ir.verify import verify
from qpass.quantize.pipelines import lower_pipeline
from qpass.targets import X86

aten = torch.ops.aten


@dataclass(frozen=True)
class DropNegatives(Pass):
    """``neg(x)  ->  x``, which is wrong, but easy to see"""

    calls: list[str] = field(default_factory=list, compare=False)

    def requires(self, gm: fx.GraphModule) -> None:
        self.calls.append("requires")

    def run(self, gm: fx.GraphModule) -> int:
        self.calls.append("run")
        found = gm.graph.find_nodes(op="call_function", target=aten.neg.default)
        for node in found:
            node.replace_all_uses_with(node.args[0])
        return len(found)

    def ensures(self, gm: fx.GraphModule) -> None:
        self.calls.append(f"ensures, {len(gm.graph.find_nodes(op='call_function', target=aten.neg.default))} left")


@dataclass(frozen=True)
class ForgetVals(Pass):
    def run(self, gm: fx.GraphModule) -> int:
        for node in gm.graph.nodes:
            node.meta.pop("val", None)
        return 1


def captured() -> fx.GraphModule:
    return capture(Do(lambda m, x: torch.sin(-torch.cos(-x))), (torch.randn(3, 4),))


def test_passes_run_in_order_and_say_what_they_did() -> None:
    gm, first, second = captured(), DropNegatives(), DropNegatives()
    runs = Pipeline("captured", (first, second)).run(gm)
    assert [(run.name, run.changes) for run in runs] == [("drop_negatives", 2), ("drop_negatives", 0)]
    assert all(run.seconds >= 0 for run in runs)
    assert first.calls == second.calls == ["requires", "run", "ensures, 0 left"]  # dead code is gone by then
    assert operators(gm).splitlines()[1:] == ["cos = cos(inputs_0)", "sin = sin(cos)", "return [sin]"]
    x = torch.randn(3, 4)
    assert torch.equal(rebuild(gm)(x), torch.sin(torch.cos(x)))


def test_who_looks_between_sees_each_pass_finished() -> None:
    seen: list[tuple[str, int, int]] = []

    def look(gm: fx.GraphModule, run: PassRun) -> None:
        seen.append((run.name, run.changes, len(gm.graph.find_nodes(op="call_function", target=aten.neg.default))))

    Pipeline("captured", (DropNegatives(), DropNegatives())).run(captured(), between=(look,))
    assert seen == [("drop_negatives", 2, 0), ("drop_negatives", 0, 0)]


def test_regions_are_passed_over_too() -> None:
    model = Do(lambda m, x: torch.cond(x.sum() > 0, lambda y: torch.exp(-y), lambda y: torch.sin(-y), (-x,)))
    gm, step = capture(model, (torch.randn(3, 4),)), DropNegatives()
    (run,) = Pipeline("captured", (step,)).run(gm)
    assert (run.changes, step.calls.count("run")) == (3, 3)
    assert operators(gm.true_graph_0).splitlines()[1:] == ["exp = exp(neg)", "return [exp]"]
    gm, x = rebuild(gm), torch.ones(3, 4)
    assert torch.equal(gm(x), torch.exp(x))
    assert torch.equal(gm(-x), torch.sin(-x))


def test_the_result_is_at_its_stage_and_verified() -> None:
    gm = captured()
    Pipeline("quantized", ()).run(gm)
    assert graph_record(gm).stage == "quantized"
    with pytest.raises(VerifyError, match="has no meta"):
        Pipeline("captured", (ForgetVals(),)).run(captured())


def test_verification_between_passes_is_one_callback_and_names_the_pass() -> None:
    def check(gm: fx.GraphModule, run: PassRun) -> None:
        try:
            verify(gm, "captured")
        except VerifyError as error:
            raise AssertionError(run.name) from error

    with pytest.raises(AssertionError, match="forget_vals"):
        Pipeline("captured", (DropNegatives(), ForgetVals(), DropNegatives())).run(captured(), between=(check,))


def test_a_pass_that_cannot_run_stops_the_pipeline_before_it_changes_anything() -> None:
    class Refuses(DropNegatives):
        def requires(self, gm: fx.GraphModule) -> None:
            raise ConvertError("it will not")

    gm = captured()
    before = operators(gm)
    with pytest.raises(ConvertError, match="it will not"):
        Pipeline("captured", (Refuses(),)).run(gm)
    assert operators(gm) == before


def test_each_pass_is_logged_with_its_count_and_time(caplog: pytest.LogCaptureFixture) -> None:
    gm = captured()
    with caplog.at_level(logging.DEBUG, logger="qpass.ir.pipeline"):
        Pipeline("captured", (DropNegatives(),)).run(gm)
    messages = [record.getMessage() for record in caplog.records if record.name == "qpass.ir.pipeline"]
    assert [message.partition(" in ")[0] for message in messages] == ["drop_negatives: 2 changes"]


MODELS: dict[str, tuple[nn.Module, Tensor]] = {
    "linears": (
        Do(lambda m, x: m.c(torch.relu(m.a(x)) + m.b(x)), **{name: nn.Linear(8, 8) for name in "abc"}),
        torch.randn(3, 8),
    ),
    "convolutions": (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        torch.randn(2, 3, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_the_real_passes_leave_a_valid_graph_each(name: str) -> None:
    """Verified between all of them; the graph computes what the quantized one computes after each."""
    model, x = MODELS[name]
    quantized = run_stages(model, x).quantized
    expected = quantized(x)
    stages: list[tuple[str, Stage]] = []

    def check(gm: fx.GraphModule, run: PassRun) -> None:
        verify(gm, "lowered")
        gm.recompile()
        # Sums of at most 36 products of values below 4, in another order: 36 * 2**-24 * 64.
        torch.testing.assert_close(gm(x), expected, atol=2e-4, rtol=0)
        stages.append((run.name, graph_record(gm).stage))

    copy = copy_graph_module(quantized)
    lower_pipeline(X86).run(copy, between=(check,))
    passes = ["lower_collectives", "carry_codes", "merge_siblings", "lower_islands", "keep_strides", "fold_constants"]
    assert [step for step, _ in stages] == passes
    assert {stage for _, stage in stages} == {"quantized"}  # the stage is reached when all have run
    assert graph_record(copy).stage == "lowered"
    assert operators(copy) == operators(qpass.lower(quantized))
    assert not any(target_name(node).startswith("conv") for node in copy.graph.nodes)


def test_a_road_ends_where_it_says() -> None:
    r = run_stages(nn.Linear(4, 4), torch.randn(3, 4), config=STATIC)
    assert [graph_record(gm).stage for gm in r[:3]] == ["prepared", "quantized", "lowered"]


@dataclass(frozen=True)
class Says(Pass):
    note: str

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(notes=(self.note,), refusals=("a: too small",), found=(len(gm.graph.nodes),))


def test_what_passes_say_of_all_regions_is_in_the_run_and_in_the_record() -> None:
    model = Do(lambda m, x: torch.cond(x.sum() > 0, lambda y: torch.exp(y), lambda y: torch.sin(y), (x,)))
    gm = capture(model, (torch.randn(3, 4),))
    graph_record(gm).notes = ["known before"]
    (run,) = Pipeline("captured", (Says("b is large"),)).run(gm)
    assert run.result.notes == ("b is large",)  # said for each of three graphs, and told once
    assert run.result.refusals == ("a: too small",)
    assert [found > 0 for found in run.result.found] == [True] * 3
    assert graph_record(gm).notes == ["known before", "b is large", "not done by says: a: too small"]
    assert graph_record(gm).passes == ("says",)


def test_a_number_is_a_result_and_anything_else_is_refused() -> None:
    class Counts(Pass):
        def run(self, gm: fx.GraphModule) -> int:
            return 3

    class ReturnsTheGraph(Pass):
        def run(self, gm: fx.GraphModule) -> fx.GraphModule:  # type: ignore[override]
            return gm

    (run,) = Pipeline("captured", (Counts(),)).run(captured())
    assert run.result == PassResult(3)
    with pytest.raises(InputError, match=r"the pass returns_the_graph returned .*, which is not the result"):
        Pipeline("captured", (ReturnsTheGraph(),)).run(captured())


def test_pipelines_are_values_that_make_other_ones() -> None:
    first, second = Says("1"), Says("2")
    pipeline = Pipeline("captured", (DropNegatives(), first))
    assert pipeline.names == ("drop_negatives", "says")
    assert pipeline.before("drop_negatives", second).passes == (second, *pipeline.passes)
    assert pipeline.after("drop_negatives", second).passes == (pipeline.passes[0], second, first)
    assert pipeline.after("says", second, second).passes == (*pipeline.passes, second, second)
    assert pipeline.without("says").passes == pipeline.passes[:1]
    assert pipeline.replace("says", second).passes == (pipeline.passes[0], second)
    assert pipeline.before("says", second).without("says").names == ("drop_negatives",)
    assert pipeline == Pipeline("captured", pipeline.passes)  # none of them changed it
    with pytest.raises(ConfigError, match=r"no pass 'drop_negative' \(did you mean 'drop_negatives'\?\)") as raised:
        pipeline.before("drop_negative", second)
    assert raised.value.hint == "its passes are drop_negatives, says"
    with pytest.raises(InputError, match="a pipeline takes passes"):
        pipeline.after("says", Says)  # type: ignore[arg-type]  # the class


def test_a_foreign_graph_keeps_its_record_and_its_regions() -> None:
    model = Do(lambda m, x: torch.cond(x.sum() > 0, lambda y: torch.exp(-y), lambda y: torch.sin(-y), (-x,)))
    gm = capture(model, (torch.randn(3, 4),))
    before = replace(graph_record(gm))
    (run,) = Pipeline("lowered", (DropNegatives(),), foreign=True).run(gm)
    assert run.changes == 1
    assert graph_record(gm) == before


def test_normalisation_is_a_pipeline_that_recordings_see() -> None:
    with qpass.record() as passes:
        gm = capture(Do(lambda m, x: torch.relu_(x + 1)), (torch.randn(3, 4),))
    assert tuple(found.name for found in passes) == qpass.passes.normalization_pipeline().names
    assert passes["functionalize_inplace"].changes == 1
    assert "relu" in operators(gm)
