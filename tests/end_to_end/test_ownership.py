"""A converted model is a value of its own, and no step writes into the caller's tensors: caches, counters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from pipeline_run import PER_TOKEN, STATIC, WEIGHT_ONLY, Do, same

CONFIGS = {"static": STATIC, "token": PER_TOKEN, "weight only": WEIGHT_ONLY, "qat": qpass.presets.int8_qat()}


def net() -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LayerNorm(128), nn.Linear(128, 4))
    return nn.Sequential(*layers).eval()


def pointers(module: nn.Module) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()] if t.numel()}


@torch.no_grad()
def spoil(module: nn.Module) -> None:
    """Other values for every parameter and buffer, in place."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.copy_(torch.full_like(tensor, 3))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_converted_model_shares_nothing_and_follows_nothing(name: str) -> None:
    model, x = net().train(name == "qat"), torch.randn(2, 3, 6, 6)
    prepared = qpass.prepare(model, (x,), config=CONFIGS[name])
    prepared(x)
    first, second = qpass.convert(prepared), qpass.convert(prepared)
    lowered = qpass.lower(first)
    assert pointers(first).isdisjoint(pointers(model) | pointers(prepared) | pointers(second))
    expected, kernels = first(x), lowered(x)
    spoil(model), spoil(prepared), spoil(second)
    assert same(first(x), expected)
    spoil(first)
    assert not same(first(x), expected)
    assert same(lowered(x), kernels)


@torch.no_grad()
def test_what_stays_in_float_is_all_that_is_copied() -> None:
    model, x = net(), torch.randn(2, 3, 6, 6)
    prepared = qpass.prepare(model, (x,), config=WEIGHT_ONLY)
    quantized = qpass.convert(prepared)
    state = quantized.state_dict()
    assert state["5.weight_codes"].dtype == torch.int8
    assert "5.weight" not in state
    assert state["4.weight"].data_ptr() != model.state_dict()["4.weight"].data_ptr()
    codes = {storage.data_ptr() for t in state.values() if (storage := t.untyped_storage()).nbytes() >= t.nbytes}
    assert len(codes) == len(state)  # no tensor drags a larger storage along, or another one's
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())


def test_loading_into_a_converted_model_leaves_the_float_model_as_it_was() -> None:
    x = torch.randn(2, 3, 6, 6)
    models = [net(), net()]
    prepared = [qpass.prepare(model, (x,), config=WEIGHT_ONLY) for model in models]
    first, second = map(qpass.convert, prepared)
    before = copy.deepcopy(models[0].state_dict())
    first.load_state_dict(second.state_dict())
    assert same(first(x), second(x))
    assert all(torch.equal(tensor, before[name]) for name, tensor in models[0].state_dict().items())
    assert same(qpass.convert(prepared[0])(x), qpass.convert(qpass.prepare(models[0], (x,), config=WEIGHT_ONLY))(x))


@torch.no_grad()
def test_tensors_that_are_plain_attributes_stay_as_they_were() -> None:
    class Cache:
        def __init__(self) -> None:
            self.keys, self.length = torch.zeros(4, 16), torch.tensor(0)

    def forward(m: Any, x: Tensor) -> Tensor:
        m.cache.length += 2
        m.cache.keys[1].add_(m.a(x)[0])
        return m.a(m.cache.keys) * m.cache.length

    net, x = Do(forward, a=nn.Linear(16, 16)).eval(), torch.randn(4, 16)
    net.cache = Cache()
    prepared = qpass.prepare(net, (x,), config=WEIGHT_ONLY)
    prepared(x)
    quantized = qpass.convert(prepared)
    assert int(net.cache.length) == 0
    assert not net.cache.keys.any()
    for _ in range(2):  # the counter alone would make a factor of two of a trace that left its write behind
        expected = net(x)
        assert (expected - quantized(x)).norm() < 0.05 * expected.norm()


def test_buffers_that_overlap_do_so_in_the_converted_model() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.cache[:4] = x
        return m.fc(m.head) + m.cache.sum()

    model = Do(forward, fc=nn.Linear(8, 8)).eval()
    model.register_buffer("cache", torch.zeros(8, 8))
    model.register_buffer("head", model.cache[2:4])
    x = torch.randn(4, 8)
    quantized = qpass.convert(qpass.prepare(model, (x,), config=WEIGHT_ONLY))
    assert not model.cache.any()
    expected = copy.deepcopy(model)(x)
    assert 10 * torch.log10(expected.square().sum() / (quantized(x) - expected).square().sum()) > 35  # int8 weights


# Written buffers


def cached(m: Any, x: Tensor) -> Tensor:
    m.state[:, :2] = m.fc(x)[:, :2]
    return m.fc(m.state)


def copied(m: Any, x: Tensor) -> Tensor:
    y = m.fc(x) + m.state
    m.state.copy_(y)
    return y


def counted(m: Any, x: Tensor) -> Tensor:
    m.state.add_(1)
    return m.fc(x) * m.state


def replaced(m: Any, x: Tensor) -> Tensor:
    m.state = m.state * 0.5 + m.fc(x)
    return m.fc(m.state)


def view_written(m: Any, x: Tensor) -> Tensor:
    m.state.view(-1)[3:9].mul_(0.5).add_(x.sum())
    return m.fc(x) + m.state


def without_gradients(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.state += m.fc(x).abs()
    return m.fc(x) + m.state


def tracked(m: Any, x: Tensor) -> Tensor:
    m.num_batches_tracked.add_(1)
    return m.fc(x) / m.num_batches_tracked


def by_one_of_two_names(m: Any, x: Tensor) -> Tensor:
    m.also.add_(1)
    return m.fc(x) + m.state


WRITERS = (
    cached, copied, counted, replaced, view_written, without_gradients, tracked, by_one_of_two_names,
)  # fmt: skip


def writer(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    model = Do(function, fc=nn.Linear(8, 8))
    model.register_buffer("state", torch.full((4, 8), 0.25))
    if function is by_one_of_two_names:
        model.register_buffer("also", model.state)
    model.register_buffer("num_batches_tracked", torch.tensor(0))
    return model.eval()


def state_of(model: nn.Module) -> list[Tensor]:
    return [tensor.clone() for tensor in model.state_dict().values()]


@pytest.mark.parametrize("function", WRITERS)
@pytest.mark.parametrize("lazily", [False, True])
@torch.no_grad()
def test_calibration_and_conversions_have_buffers_of_their_own(function: Callable[..., Any], lazily: bool) -> None:
    model, batches = writer(function), [torch.randn(4, 8) for _ in range(3)]
    before = state_of(model)
    other = qpass.prepare(model, (batches[0],), config=STATIC)
    prepared = qpass.prepare(model, config=STATIC) if lazily else qpass.prepare(model, (batches[0],), config=STATIC)
    twin = copy.deepcopy(model)
    for x in batches:
        assert same(prepared(x), twin(x))  # in step with the float model, state and all
    other(batches[0])
    assert all(map(torch.equal, state_of(model), before))
    first, second = qpass.convert(prepared), qpass.convert(prepared)
    lowered = qpass.lower(first)
    begun = copy.deepcopy(model)
    for x in batches:  # from where the float model stands, whatever calibration and the other conversion did
        results = [first(x), second(x), lowered(x), begun(x)]
        assert same(results[0], results[1])
        # 8 bits give about 40 dB, a little less as errors gather in the state; a foreign state gives below 20
        for result in results[1:3]:
            assert 10 * torch.log10(results[3].square().sum() / (result - results[3]).square().sum()) > 28
    assert all(map(torch.equal, state_of(model), before))
    if function is cached:
        assert same(first.state[:, 2:], model.state[:, 2:])


@torch.no_grad()
def test_a_conversion_starts_from_what_the_float_model_holds_then() -> None:
    model, x = writer(counted), torch.randn(4, 8)
    prepared = qpass.prepare(model, (x,), config=STATIC)
    prepared(x), model(x), model(x)
    assert qpass.convert(prepared).state[0, 0] == model.state[0, 0] == 2.25
    assert prepared.state[0, 0] == 1.25


@torch.no_grad()
def test_training_leaves_the_callers_buffers_alone_and_its_own_go_on() -> None:
    class Counting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.steps.add_(1)
            return super().forward(x) * self.steps

    model = Counting(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model.register_buffer("steps", torch.tensor(0.0))
    before, x = state_of(model), torch.randn(4, 8)
    prepared = qpass.prepare(model.train(), (x,), config="int8_qat")
    prepared(x), prepared(x)
    first, second = qpass.convert(prepared), qpass.convert(prepared)
    assert all(map(torch.equal, state_of(model), before))
    first(x)
    assert (first.steps, second.steps, prepared.steps) == (3, 2, 2)


@torch.no_grad()
def test_a_weight_that_forward_renormalizes_stays_the_callers() -> None:
    table = nn.Embedding(10, 8, max_norm=0.5)
    model = nn.Sequential(table, nn.Linear(8, 8)).eval()
    before, indices = table.weight.clone(), torch.arange(10)[None]
    prepared = qpass.prepare(model, (indices,), config=STATIC)
    prepared(indices)
    assert torch.equal(table.weight, before)


def test_a_compiled_float_model_still_writes_its_own_buffers() -> None:
    """The backend quantizes no copy: the model is compiled as it is, its state with it."""
    model, x = writer(counted), torch.randn(4, 8)
    compiled = torch.compile(model, backend="qpass")
    with torch.no_grad():
        compiled(x), compiled(x)
    assert model.state[0, 0] == 2.25


def test_a_prepared_copy_keeps_its_conversion_apart() -> None:
    model, x = writer(counted), torch.randn(4, 8)
    prepared = qpass.prepare(model, (x,), config=STATIC)
    twin: fx.GraphModule = copy.deepcopy(prepared)
    twin(x)
    with torch.no_grad():
        assert qpass.convert(twin).state[0, 0] == 0.25
    assert prepared.state[0, 0] == 0.25
