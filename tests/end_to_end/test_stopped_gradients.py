"""Gradients stop in a graph for training where they stop in the model: the same gradients, bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from pipeline_run import Do
from qpass.fake_quantize import disable_fake_quant

X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


def under_no_grad(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.body(x).relu()
    return m.head(y)


def grad_mode_switched(m: Any, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        y = m.body(x).relu()
        with torch.enable_grad():
            z = m.body(x)
    return m.head(y + z)


@torch.no_grad()
def backbone(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.body(x).relu()
    return result


@torch.no_grad()
def all_of_it(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.head(m.body(x).relu())
    return result


def detached_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.body(x)
    before = y.sigmoid()
    return m.head(y.detach_() + before)


def straight_through(m: Any, x: Tensor) -> Tensor:
    y = m.body(x)
    return m.head(y + (y.round() - y).detach())


def one_head_detached(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = m.body(x).relu()
    return m.head(y.detach()), m.other(y)


def detached_weight(m: Any, x: Tensor) -> Tensor:
    y = nn.functional.linear(x, m.body.weight.detach(), m.body.bias)
    return m.head(y) + m.other(m.body(x))


def moving_average(m: Any, x: Tensor) -> Tensor:
    y = m.body(x)
    with torch.no_grad():
        m.average.mul_(0.9).add_(y.mean(0) * 0.1)
    return m.head(y - m.average)


def partly(m: Any, x: Tensor) -> Tensor:
    y = m.body(x)
    return m.head(y * y.detach().sigmoid())


FORWARDS: dict[str, Callable[..., Any]] = {
    "no_grad": under_no_grad,
    "set_grad_enabled": grad_mode_switched,
    "decorated": lambda m, x: m.head(backbone(m, x)),
    "all decorated": all_of_it,
    "detach": lambda m, x: m.head(m.body(x).relu().detach()),
    "detach before relu": lambda m, x: m.head(m.body(x).detach().relu()),
    "detach_": detached_in_place,
    "straight through": straight_through,
    "one head": one_head_detached,
    "weight": detached_weight,
    "average": moving_average,
    "partly": partly,
}


def model(forward: Callable[..., Any]) -> Do:
    torch.manual_seed(1)
    parts = {"body": nn.Linear(8, 8), "head": nn.Linear(8, 2), "other": nn.Linear(8, 2)}
    made = Do(forward, **parts)
    made.register_buffer("average", torch.zeros(8))
    return made


def gradients(m: nn.Module, steps: int = 2) -> dict[str, Tensor | None]:
    x = X.clone().requires_grad_()
    for _ in range(steps):  # a second one would meet a state that still has the graph of the first
        results = m(x)
        loss = sum(y.square().sum() for y in (results if isinstance(results, tuple) else (results,)))
        assert isinstance(loss, Tensor)
        if loss.requires_grad:
            loss.backward()
    return {"x": x.grad, **{name: p.grad for name, p in m.named_parameters()}}


def same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FORWARDS)
def test_gradients_without_rounding_are_those_of_the_model(name: str, training: bool) -> None:
    float_model = model(FORWARDS[name]).train(training)
    prepared = qpass.prepare(copy.deepcopy(float_model), (X,), config="int8_qat")
    prepared.apply(disable_fake_quant)
    expected, found = gradients(float_model), gradients(prepared)
    assert set(found) <= set(expected)
    for key, value in expected.items():
        assert same(found.get(key), value), key
    assert torch.equal(prepared.average, float_model.average) if name == "average" else True


@pytest.mark.parametrize("name", FORWARDS)
def test_rounded_gradients_stop_at_the_same_places(name: str) -> None:
    float_model = model(FORWARDS[name]).train()
    prepared = qpass.prepare(float_model, (X,), config="int8_qat")
    expected, found = gradients(float_model), gradients(prepared)
    stops = {key for key, value in expected.items() if value is None}
    assert {key for key in expected if found.get(key) is None} == stops


@pytest.mark.parametrize("name", [name for name in FORWARDS if name != "average"])
def test_what_stops_is_gone_from_the_converted_graph(name: str) -> None:
    prepared = qpass.prepare(model(FORWARDS[name]).train(), (X,), config=qpass.presets.int8_qat(compute_dtype=None))
    prepared(X)
    prepared.eval()
    quantized = qpass.convert(prepared)
    assert "detach" not in quantized.code
    with torch.no_grad():
        for ours, theirs in zip(torch.utils._pytree.tree_leaves(quantized(X)),
                                torch.utils._pytree.tree_leaves(prepared(X)), strict=True):  # fmt: skip
            assert torch.equal(ours, theirs)


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def test_a_backward_of_the_models_own_is_named_when_it_is_lost() -> None:
    apply = torch.autograd.Function.__dict__["apply"]
    with pytest.warns(UserWarning, match="qpass trains Round by the gradient of what its forward computes"):
        qpass.prepare(model(lambda m, x: m.head(Round.apply(m.body(x)))).train(), (X,), config="int8_qat")
    assert torch.autograd.Function.__dict__["apply"] is apply
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qpass.prepare(model(straight_through).train(), (X,), config="int8_qat")
