"""prepare, calibrate, convert, lower: what the four calls take, what they return, and what they leave alone."""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from bound import Near, bounds
from qpass import QuantizationSpec, presets
from qpass.errors import StrictError
from qpass.ir.record import graph_record, record_of
from qpass.ir.text import target_name
from qpass.targets import Target, registry
from qpass.targets.x86.target import X86

DYNAMIC = QuantizationSpec(torch.int8, qpass.PerToken(), symmetric=True, dynamic=True)


class Net(nn.Module):
    """Images [B, 3, 8, 8] -> [B, 5], through a convolution with batch norm, a layer norm and two linears."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.norm = nn.LayerNorm(8)
        self.hidden, self.out = nn.Linear(8, 16), nn.Linear(16, 5)
        self.bn.running_mean.normal_(std=0.2)
        self.bn.running_var.uniform_(0.5, 2)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(image)))
        return self.out(nn.functional.gelu(self.hidden(self.norm(x.mean((2, 3))))))


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def quantize(model: nn.Module, *inputs: Any, **options: Any) -> fx.GraphModule:
    prepared = qpass.prepare(model, inputs, **options)
    with torch.no_grad():
        prepared(*inputs)
    return qpass.convert(prepared)


def outcomes(gm: fx.GraphModule) -> dict[str, str]:
    """Operator -> outcome of its record."""
    found = {node: record_of(node) for node in gm.graph.nodes}
    return {record.op: record.outcome for record in found.values() if record is not None}


def operators(gm: fx.GraphModule) -> list[str]:
    return [target_name(node) for node in gm.graph.nodes if node.op == "call_function"]


# The stages


@torch.no_grad()
def test_prepare_alone_captures_at_the_first_batch() -> None:
    model, batches = Net().eval(), [images(4), images(4), images(3)]
    prepared = qpass.prepare(model)
    for batch in batches:
        assert torch.equal(prepared(batch), model(batch))
    ours, theirs = qpass.convert(prepared), qpass.prepare(model, (batches[0],))
    qpass.calibrate(theirs, batches)
    assert ours.code == qpass.convert(theirs).code  # the first batch was observed, too, and scales are in the code
    assert 20 < qpass.sqnr(model, ours, images(64)) < 60  # int8: neither broken nor left in float
    assert graph_record(qpass.lower(ours)).stage == "lowered"


@pytest.mark.parametrize("batch", [1, 3, 7])
@torch.no_grad()
def test_every_batch_size_works_at_every_stage(batch: int) -> None:
    model, x = Net().eval(), images(batch)
    prepared = qpass.prepare(model, (images(4),), config=presets.int8_static(compute_dtype=None))
    qpass.calibrate(prepared, [images(4), images(2)])
    quantized = qpass.convert(prepared)
    assert torch.equal(prepared(x), model(x))
    (expected,) = bounds(quantized, (x,))
    assert expected.value.shape == (batch, 5)
    assert expected.within(qpass.lower(quantized)(x))
    for row in range(batch):  # a row of a batch is what it is alone
        assert Near(expected.value[row : row + 1], expected.radius[row : row + 1]).within(quantized(x[row : row + 1]))


@torch.no_grad()
def test_convert_again_gives_the_same_and_calibration_goes_on() -> None:
    prepared, x = qpass.prepare(Net().eval(), (images(4),)), images(4)
    qpass.calibrate(prepared, [x])
    first, second = qpass.convert(prepared), qpass.convert(prepared)
    assert first.code == second.code
    assert torch.equal(first(x), second(x))
    qpass.calibrate(prepared, [4 * x])
    third = qpass.convert(prepared)
    assert third.code != first.code  # other scales
    assert torch.equal(first(x), second(x))


@torch.no_grad()
def test_lower_again_gives_the_same_and_leaves_the_reference() -> None:
    quantized, x = quantize(Net().eval(), images(4)), images(4)
    code, reference = quantized.code, quantized(x)
    first, second = qpass.lower(quantized), qpass.lower(quantized)
    assert torch.equal(first(x), second(x))
    assert quantized.code == code
    assert torch.equal(quantized(x), reference)


# What prepare takes


@torch.no_grad()
def test_every_form_of_a_model_is_quantized_alike() -> None:
    model, x = Net().eval(), images(4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    reference = quantize(model, x)(x)
    for form in (program, program.module(), copy.deepcopy(program.module(check_guards=False))):
        prepared = qpass.prepare(form)
        qpass.calibrate(prepared, [x])
        assert torch.equal(qpass.convert(prepared)(x), reference)


class Named(nn.Module):
    """Inputs by keyword, one of them a tensor in a dict; outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor, *, extra: dict[str, Tensor], gain: float = 1.0) -> dict[str, Tensor]:
        y = self.fc(x) * gain
        return {"sum": y + extra["bias"], "y": y}


@torch.no_grad()
def test_keyword_inputs_and_structured_outputs() -> None:
    model = Named().eval()

    def inputs(batch: int) -> dict[str, Any]:
        return {"extra": {"bias": torch.randn(batch, 8)}, "gain": 2.0}

    prepared = qpass.prepare(model, (torch.randn(4, 8),), kwargs=inputs(4))
    x, keywords = torch.randn(3, 8), inputs(3)
    ours, theirs = prepared(x, **keywords), model(x, **keywords)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    quantized = qpass.convert(prepared)
    assert quantized(x, **keywords).keys() == theirs.keys()
    assert qpass.sqnr(model, quantized, {"x": x, **keywords}) > 25


# calibrate


class Counting(nn.Module):
    """Counts the batches it is called on and how it is called."""

    def __init__(self, prepared: nn.Module) -> None:
        super().__init__()
        self.prepared = prepared
        self.calls: list[tuple[int, tuple[str, ...]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        assert not torch.is_grad_enabled()
        self.calls.append((len(args), tuple(kwargs)))
        return self.prepared(*args, **kwargs)


def test_calibrate_takes_tensors_tuples_and_dicts() -> None:
    model = Counting(qpass.prepare(Net().eval(), (images(4),)))
    assert qpass.calibrate(model, iter([images(4), (images(3),), [images(2)], {"image": images(1)}])) is model
    assert model.calls == [(1, ()), (1, ()), (1, ()), (0, ("image",))]
    assert qpass.convert(model.prepared)(images(2)).shape == (2, 5)


@pytest.mark.parametrize(
    ("progress", "terminal", "shown"),
    [(None, False, False), (None, True, True), (True, False, True), (False, True, False)],
)
def test_the_progress_bar_is_silent_off_a_terminal(
    progress: bool | None, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", screen)
    qpass.calibrate(qpass.prepare(Net().eval(), (images(4),)), [images(4)], progress=progress)
    assert ("calibrate" in screen.getvalue()) is shown


# What the calls leave alone


def test_the_callers_model_is_untouched() -> None:
    model, x = Net(), images(4)
    model.eval()
    model.hidden.weight.requires_grad_(False)
    seen: list[Tensor] = []
    hook = model.out.register_forward_hook(lambda module, args, output: seen.append(output))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    before = describe(model)
    quantized = quantize(model, x)
    qpass.lower(quantized)(x)
    assert describe(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    seen.clear()
    model(x).sum().backward()  # gradients still flow into the weights that are shared
    assert len(seen) == 1
    assert model.conv.weight.grad is not None
    assert model.hidden.weight.grad is None
    hook.remove()


def describe(model: nn.Module) -> list[Any]:
    """Modules with their flags and hooks, tensors with theirs, by identity."""
    modules = [(path, id(m), m.training, len(m._forward_hooks), sorted(vars(m))) for path, m in model.named_modules()]
    tensors = [
        (name, id(t), t.data_ptr(), t.requires_grad, t._version)
        for name, t in [*model.named_parameters(), *model.named_buffers()]
    ]
    return [modules, tensors]


def test_prepare_copies_no_weight_and_convert_copies_what_stays_in_float() -> None:
    model = Net().eval()
    prepared = qpass.prepare(model, (images(4),))
    assert isinstance(prepared, fx.GraphModule)
    ours = dict(prepared.named_parameters())
    assert ours.keys() == dict(model.named_parameters()).keys()
    assert all(ours[name] is parameter for name, parameter in model.named_parameters())
    prepared(images(4))
    quantized = dict(qpass.convert(prepared).named_parameters())
    assert torch.equal(quantized["norm.weight"], model.norm.weight)
    assert quantized["norm.weight"].data_ptr() != model.norm.weight.data_ptr()
    assert not any(parameter.requires_grad for parameter in quantized.values())
    assert "out.weight" not in quantized  # its codes took its place


# Configurations


def test_presets_choose_the_operators() -> None:
    x = images(4)
    static = operators(quantize(Net().eval(), x, config="int8_static"))
    assert "quantize_per_tensor" in static
    assert not any(name.startswith("choose_qparams") for name in static)
    dynamic = quantize(Net().eval(), x, config="int8_dynamic")
    assert outcomes(dynamic) | {"conv2d": "float", "linear": "quantized"} == outcomes(dynamic)
    assert operators(dynamic).count("choose_qparams_per_token") == 2
    tensor = operators(quantize(Net().eval(), x, config=presets.int8_dynamic("tensor")))
    assert tensor.count("choose_qparams.tensor") == 2
    weight_only = operators(quantize(Net().eval(), x, config="int8_weight_only"))
    assert weight_only.count("dequantize_per_channel") == 2
    assert not any(name.startswith(("quantize", "choose")) for name in weight_only)
    groups = operators(quantize(Net().eval(), x, config=presets.int8_weight_only(group_size=8)))
    assert groups.count("dequantize_per_channel_group") == 2


@pytest.mark.parametrize(
    "keep",
    [
        lambda c: c.keep_float(module="out"),
        lambda c: c.keep_float(module="o*"),
        lambda c: c.override(module="out", activation=None, weight=None),
    ],
)
def test_what_is_kept_in_float_is_computed_as_before(keep: Callable[[Any], Any]) -> None:
    model, x = Net().eval(), images(4)
    config = keep(presets.int8_static(compute_dtype=None))
    quantized = quantize(model, x, config=config)
    kept = [record for node in quantized.graph.nodes if (record := record_of(node)) and record.module == "out"]
    assert [(record.outcome, record.reason) for record in kept] == [
        ("float", "override 0 of the configuration leaves it in float")
    ]
    assert torch.equal(quantized.get_parameter("out.weight"), model.out.weight)


def test_overrides_by_type_and_by_operator_and_the_first_wins() -> None:
    model, x = Net().eval(), images(4)
    static = presets.int8_static(compute_dtype=None)
    assert outcomes(quantize(model, x, config=static.keep_float(module_type=nn.Conv2d)))["conv2d"] == "float"
    assert outcomes(quantize(model, x, config=static.keep_float(op="linear")))["linear"] == "float"
    mixed = static.override(module="hidden", activation=DYNAMIC).keep_float(module_type="Linear")
    names = operators(quantize(model, x, config=mixed))
    assert names.count("choose_qparams_per_token") == 1  # hidden, although it is a Linear
    assert names.count("dequantize_per_channel") == 2  # the convolution and hidden, not out


def test_compute_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_given", {})  # the other target is gone afterwards
    model, x = Net().eval(), images(4)

    def casts(dtype: Any, target: Target = X86) -> set[torch.dtype]:
        config = presets.int8_static(compute_dtype=dtype).keep_float(module="out")
        graph = quantize(model, x, config=config, target=target).graph
        return {node.args[1] for node in graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)}

    assert casts(None) == set()
    assert casts(torch.bfloat16) == {torch.bfloat16, torch.float32}  # down for `out`, up for what is returned
    assert casts("auto") == casts(X86.fast_dtype())
    other = replace(X86, name="other", fast_dtype=lambda: torch.float16)
    assert torch.float16 in casts("auto", other)
    out = quantize(model, x, config=presets.int8_static(compute_dtype=torch.bfloat16))(x)
    assert out.dtype == torch.float32


def test_strict() -> None:
    model, x = Net().eval(), images(4)
    prepared = qpass.prepare(model, (x,), config=presets.int8_dynamic())
    with pytest.raises(StrictError, match="conv \\(conv2d\\): qconv takes one static activation scale per tensor"):
        qpass.convert(prepared, strict=True)
    accepted = presets.int8_dynamic().keep_float(module="conv")
    quantized = qpass.convert(qpass.prepare(model, (x,), config=accepted), strict=True)
    assert outcomes(quantized)["linear"] == "quantized"
    qpass.lower(quantized, strict=True)
    qpass.lower(quantize(model, x), strict=True)
