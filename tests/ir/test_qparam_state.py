"""Scales, zero points and specs in state dicts: what is loaded gives the outputs of what was saved, or is refused."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

import qpass
from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, WEIGHT_ONLY, Do, same
from qpass import Config, PerChannel, PerGroup, PerTensor, QuantizationSpec
from qpass.errors import StateError
from qpass.spec.fake_quantize.spec_state import text_of

X = torch.linspace(-3, 2, 32).reshape(4, 8).sin()


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


def converted(seed: int, scale: float = 1.0, config: Any = STATIC, make: Callable[[int], nn.Module] = net) -> Any:
    """A conversion that saw inputs ``scale`` times as large, of both signs; another seed is another model."""
    model = make(seed)
    prepared = qpass.prepare(model, (X,), config=config)
    with torch.no_grad():
        prepared(scale * X), prepared(-scale * X)
    return qpass.convert(prepared)


def specs(state: dict[str, Any]) -> dict[str, str]:
    return {key: text_of(value) for key, value in state.items() if key.endswith("spec")}


def test_the_keys_are_readable_and_the_same_in_every_compute_dtype() -> None:
    state = converted(0).state_dict()
    assert specs(state) == {
        "0/weight_spec": "int8 -127..127 per channel 0", "2/weight_spec": "int8 -127..127 per channel 0",
        "input_spec": "uint8 0..255 per tensor", "1/output_spec": "uint8 0..255 per tensor",
    }  # fmt: skip
    span = 2 * X.abs().max().item()
    assert state["input_scale"].item() == pytest.approx(span / 255, rel=0.05)  # the histogram may clip a little
    assert state["input_scale"].dtype == torch.float64
    assert state["1/output_zero_point"].item() == 0  # behind a relu
    low = converted(0, config=qpass.presets.int8_static(compute_dtype=torch.bfloat16)).state_dict()
    assert state.keys() == low.keys()


def branches(m: Any, x: Tensor) -> Tensor:
    def first(x: Tensor) -> Tensor:
        return m.a(m.b(x))

    return torch.cond(x.sum() > 0, first, lambda x: m.b(torch.relu(m.a(x))), (x,)) + (m.a(x) @ m.b(x).t()) @ x


def with_regions(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Do(branches, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval()


@pytest.mark.parametrize("make", [net, with_regions])
@torch.no_grad()
def test_what_is_loaded_gives_the_outputs_of_what_was_saved(make: Callable[[int], nn.Module]) -> None:
    first, second = converted(0, make=make), converted(1, scale=50, make=make)
    for x in (X, -X):
        assert not same(first(x), second(x))
    assert not first.load_state_dict(second.state_dict()).missing_keys
    for x in (X, -X, 60 * X):
        assert same(first(x), second(x))
        assert same(qpass.lower(first)(x), qpass.lower(second)(x))
    again = copy.deepcopy(first)
    again.load_state_dict(converted(0, make=make).state_dict())
    assert same(again(X), converted(0, make=make)(X))
    assert same(first(X), second(X))


@pytest.mark.parametrize("assign", [False, True])
@torch.no_grad()
def test_through_a_file_that_holds_tensors_alone(assign: bool) -> None:
    first, second, file = converted(0), converted(1, scale=50), io.BytesIO()
    torch.save(second.state_dict(), file)
    file.seek(0)
    first.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert same(first(X), second(X))


@torch.no_grad()
def test_compiled_forms_do_not_go_on_with_the_old_scales() -> None:
    """One is compiled itself, the other is called by a function that is: Dynamo guards on that model's class alone."""
    first, second = converted(0), converted(1, scale=50)
    direct = torch.compile(first, backend="qpass")
    within = torch.compile(lambda x: first(x), backend="eager")
    bounds = {direct: 1e-5, within: 0.0}  # kernels sum in another order, in float32
    for compiled, bound in bounds.items():
        torch.testing.assert_close(compiled(X), first(X), atol=bound, rtol=bound)
    first.load_state_dict(second.state_dict())
    assert not torch.allclose(first(X), converted(0)(X), atol=0.05)
    for compiled, bound in bounds.items():
        torch.testing.assert_close(compiled(X), second(X), atol=bound, rtol=bound)


@torch.no_grad()
def test_a_part_of_a_state_changes_a_part_of_the_model() -> None:
    first, second = converted(0), converted(1, scale=50)
    before, state = first.state_dict(), second.state_dict()
    part = {key: value for key, value in state.items() if key.startswith(("0", "1", "input"))}
    result = first.load_state_dict(part, strict=False)
    assert set(result.missing_keys) == set(state) - set(part)
    assert not result.unexpected_keys
    expected = {key: part.get(key, before[key]) for key in before}
    assert all(torch.equal(value, expected[key]) for key, value in first.state_dict().items())
    with pytest.raises(RuntimeError, match=r'Missing key.*"1/output_scale"'):
        first.load_state_dict({key: value for key, value in state.items() if key != "1/output_scale"})


@torch.no_grad()
def test_a_converted_part_of_a_model_and_a_distributed_checkpoint() -> None:
    for wrap in (nn.Sequential, lambda model: model):
        first, second = wrap(converted(0)), wrap(converted(1, scale=50))
        first.load_state_dict(second.state_dict())
        assert same(first(X), second(X))
    third = converted(0)
    set_model_state_dict(third, get_model_state_dict(second))
    assert same(third(X), second(X))


@torch.no_grad()
def test_a_model_from_a_file_takes_the_same_states(tmp_path: Path) -> None:
    first, second = converted(0), converted(1, scale=50)
    qpass.save(first, tmp_path / "first.pt2")
    loaded = qpass.load(tmp_path / "first.pt2")
    assert loaded.state_dict().keys() == first.state_dict().keys()
    loaded.load_state_dict(second.state_dict())
    assert same(loaded(X), second(X))


# Refusals

WEIGHT = QuantizationSpec(torch.int8, PerChannel(0))
FOUR_BITS = QuantizationSpec(torch.int8, PerChannel(0), quant_min=-7, quant_max=7)
REFUSED: dict[str, tuple[Config, str]] = {
    "another range": (
        dataclasses.replace(STATIC, activation=QuantizationSpec(torch.uint8, symmetric=False, quant_max=127)),
        "input_spec: the state is of uint8 0..127 per tensor, and this model quantizes to uint8 0..255 per tensor",
    ),
    "another dtype": (
        dataclasses.replace(STATIC, activation=QuantizationSpec(torch.int8, PerTensor())),
        "input_spec: the state is of int8 -127..127 per tensor, and this model quantizes to uint8 0..255 per tensor",
    ),
    "per token": (
        PER_TOKEN,
        "1/output_spec: the state is of int8 -127..127 per token, dynamic and symmetric, and this model",
    ),
    "dynamic": (PER_TENSOR, "1/output_spec: the state is of uint8 0..255 per tensor, dynamic, and this model"),
    "weights in 4 bits": (
        dataclasses.replace(STATIC, weight=FOUR_BITS),
        "0/weight_spec: the state is of int8 -7..7 per channel 0, and this model quantizes to int8 -127..127 per",
    ),
    "weights per group": (
        dataclasses.replace(WEIGHT_ONLY, weight=QuantizationSpec(torch.int8, PerGroup(8))),
        "2/weight_spec: the state is of int8 -127..127 per group of 8, and this model",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("strict", [True, False])
def test_a_state_of_another_configuration_is_refused_and_nothing_is_loaded(name: str, strict: bool) -> None:
    model, (config, message) = converted(0), REFUSED[name]
    expected = model(X)
    with pytest.raises(StateError, match="was not loaded") as refused:
        model.load_state_dict(converted(1, config=config).state_dict(), strict=strict)
    assert message in str(refused.value)
    assert isinstance(refused.value, RuntimeError)  # as torch's own refusals are
    assert same(model(X), expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_scale", torch.tensor(0.0), "input_scale: 0.0 is not positive and finite"),
        ("input_scale", torch.tensor(torch.nan), "input_scale: nan is not positive and finite"),
        ("input_scale", torch.ones(3), "input_scale: one number is expected, not a tensor of float32 [3]"),
        ("input_scale", 0.5, "input_scale: one number is expected, not a float"),
        ("input_scale", torch.ones((), device="meta"), "a tensor of float32 [] on meta"),
        ("1/output_zero_point", torch.tensor(-1), "1/output_zero_point: -1 is not a code within 0..255"),
        ("1/output_zero_point", torch.tensor(0.5), "1/output_zero_point: 0.5 is not a code within 0..255"),
    ],
)
def test_numbers_that_cannot_be_are_refused_by_their_key(key: str, value: Any, message: str) -> None:
    model = converted(0)
    expected = model(X)
    with pytest.raises(StateError) as refused:
        model.load_state_dict({**converted(1).state_dict(), key: value})
    assert message in str(refused.value)
    assert same(model(X), expected)


def test_a_float_state_is_refused_by_torch_with_the_keys() -> None:
    with pytest.raises(RuntimeError, match=r'Missing key.*"input_scale".*\n.*Unexpected key.*"0.weight"'):
        converted(0).load_state_dict(net(1).state_dict())


def test_a_lowered_graph_loads_no_state() -> None:
    lowered = qpass.lower(converted(0))
    expected = lowered(X)
    with pytest.raises(StateError, match=r"a lowered graph loads no state dict.*\n  to do: load it into the quantized"):
        lowered.load_state_dict(converted(1).state_dict())
    assert same(lowered(X), expected)


# Training


def trained(seed: int, bits: int) -> fx.GraphModule:
    half = 2 ** (bits - 1)
    config = qpass.presets.int8_qat()
    weight = dataclasses.replace(config.weight, quant_min=1 - half, quant_max=half - 1)
    activation = dataclasses.replace(config.activation, quant_max=2 * half - 1)
    config = dataclasses.replace(config, weight=weight, activation=activation)
    prepared = qpass.prepare(net(seed).train(), (X,), config=config)
    assert isinstance(prepared, fx.GraphModule)
    prepared(X)
    return prepared.eval()


def test_training_goes_on_from_a_state_of_the_same_bits_and_refuses_others() -> None:
    model, other = trained(0, 8), trained(1, 8)
    before = model(X)
    with pytest.raises(StateError) as refused:
        model.load_state_dict(trained(1, 4).state_dict())
    assert (
        "activation_post_process_0/spec: the state is of uint8 0..15 per tensor, and this model rounds to uint8 0..255"
    ) in str(refused.value)
    assert same(model(X), before)
    model.load_state_dict(other.state_dict())
    assert same(model(X), other(X))
    assert same(qpass.convert(model)(X), qpass.convert(other)(X))
    with pytest.raises(StateError, match=r"-7\.\.7"):
        qpass.convert(model).load_state_dict(qpass.convert(trained(1, 4)).state_dict())
