"""Gradients through a converted model: those of the fake-quantized reference, written here with detach."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, WEIGHT_ONLY, Do
from qpass.errors import InputError

CONFIGS = {"static": STATIC, "token": PER_TOKEN, "tensor": PER_TENSOR, "weight": WEIGHT_ONLY}
X = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))


class Reference(fx.Interpreter):
    """A q/dq graph whose pairs are ``y + (value - y).detach()``, y being x inside the range and 0 outside."""

    clamped = 0

    def run_node(self, n: fx.Node) -> Any:
        name = str(n.target)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if "choose_qparams" in name:
            return n.target(*(a.detach() if isinstance(a, Tensor) else a for a in args), **kwargs)  # type: ignore[operator]
        if "quantized_decomposed.quantize_per" in name:
            x, scale, zero_point, low, high = args[:5]
            by_token = "per_token" in name
            unclamped = (x / scale + zero_point).round() if by_token else (x / scale).round() + zero_point
            inside = (unclamped >= low) & (unclamped <= high)
            self.clamped += int((~inside).sum())
            codes = n.target(x.detach(), *args[1:], **kwargs)  # type: ignore[operator]
            return codes, torch.where(inside, x, 0)
        if "quantized_decomposed.dequantize_per" in name and isinstance(args[0], tuple):
            codes, y = args[0]
            value = n.target(codes, *args[1:], **kwargs)  # type: ignore[operator]
            return y + (value - y).detach()
        return super().run_node(n)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()


def converted(config: Any, model: nn.Module | None = None) -> fx.GraphModule:
    prepared = qpass.prepare(model or network(), (X,), config=config)
    with torch.no_grad():
        prepared(X)
    return qpass.convert(prepared)


def gradient(f: Callable[[Tensor], Tensor], x: Tensor = X) -> Tensor:
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(f(x).square().sum(), x)
    return grad


def decibels(exact: Tensor, found: Tensor) -> float:
    return 10 * torch.log10(exact.square().sum() / (exact - found).square().sum()).item()


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_those_of_the_reference(name: str) -> None:
    quantized = converted(CONFIGS[name])
    for x in (X, X * 2):  # twice the range that was seen: a static range clamps
        reference = Reference(quantized)
        expected = gradient(reference.run, x)
        # The values agree but for y + (value - y), rounded twice; so do the gradients, which depend on them smoothly.
        torch.testing.assert_close(gradient(quantized, x), expected, rtol=1e-4, atol=1e-5)
        # the greatest value seen may lie on the far side of a tie, and be clamped by half a step
        assert (reference.clamped > 10) is (name == "static" and x is not X)
    # 8-bit weights alone leave about 40 dB in three layers; 8-bit activations take some ten more.
    assert decibels(gradient(network()), gradient(quantized)) > 25
    with torch.no_grad():
        assert torch.equal(quantized(X.clone().requires_grad_()), quantized(X))
    assert not quantized(X).requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_they_are_the_same(name: str) -> None:
    quantized = converted(CONFIGS[name])
    compiled = torch.compile(quantized, backend="qpass")
    expected, found = gradient(quantized), gradient(compiled)
    # a fused loop may put a value on the other side of a rounding tie: one code of 255 there
    assert decibels(expected, found) > 40


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_around_a_frozen_model_learn(name: str) -> None:
    quantized, float_model = converted(CONFIGS[name]), network().requires_grad_(False)
    adapters = nn.Linear(32, 32), nn.Linear(4, 4)
    grads = []
    for inner in (quantized, Reference(quantized).run, float_model):
        whole = nn.Sequential(*adapters)
        whole[1](inner(X + whole[0](X) / 8)).square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in whole.parameters()]))
        whole.zero_grad()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)  # sums over 8 rows of the above
    assert decibels(grads[2], grads[0]) > 25
    assert all(p.grad is None for p in quantized.parameters())


def test_a_parameter_that_was_thawed_has_a_gradient() -> None:
    quantized = converted(STATIC)
    bias = quantized.get_parameter("0.bias").requires_grad_()
    quantized(X).sum().backward()
    expected = bias.grad.clone()
    bias.grad = None
    Reference(quantized).run(X).sum().backward()
    torch.testing.assert_close(expected, bias.grad, rtol=1e-4, atol=1e-5)
    assert expected.abs().min() > 0


def test_inputs_by_keyword_containers_and_hooks() -> None:
    def forward(m: Any, pair: Any, scale: Tensor) -> dict[str, Tensor]:
        return {"y": m.fc(pair[0] * scale) + pair[1]}

    class Model(Do):
        def forward(self, pair: Any, scale: Tensor) -> Any:
            return forward(self, pair, scale)

    pair, scale = (X, X + 1), torch.ones(1)
    prepared = qpass.prepare(Model(forward, fc=nn.Linear(32, 32)), (pair,), kwargs={"scale": scale}, config=STATIC)
    prepared(pair, scale=scale)
    quantized = qpass.convert(prepared)
    seen: list[Any] = []
    quantized.register_forward_hook(lambda module, args, result: seen.append(result["y"].shape))
    asked = X.clone().requires_grad_()
    y = quantized((asked, X + 1), scale=scale)["y"]
    assert torch.equal(y, quantized(pair, scale=scale)["y"])
    y.sum().backward()
    assert asked.grad is not None
    assert len(seen) == 2


def test_a_lowered_model_refuses() -> None:
    lowered = qpass.lower(converted(STATIC))
    with pytest.raises(InputError, match="a lowered model has no gradients"):
        lowered(X.clone().requires_grad_())
    with torch.no_grad():
        lowered(X.clone().requires_grad_())


def test_an_exported_graph_keeps_torchs_operators() -> None:
    program = torch.export.export(converted(STATIC), (X.clone().requires_grad_(),))
    namespaces = {getattr(n.target, "namespace", "") for n in program.graph.nodes}
    assert "quantized_decomposed" in namespaces
    assert "qpass_decomposed" not in namespaces
