from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpass.errors import CalibrationError, ConfigError
from qpass.fake_quantize import FakeQuantize, LearnableFakeQuantize
from qpass.observer import MinMaxObserver, MovingAveragePerChannelMinMaxObserver

RANGE: Any = {"dtype": torch.int8, "quant_min": -8, "quant_max": 7}


def per_tensor(**keywords: Any) -> LearnableFakeQuantize:
    return LearnableFakeQuantize(MinMaxObserver, qscheme=torch.per_tensor_symmetric, **RANGE | keywords)


def per_channel(**keywords: Any) -> LearnableFakeQuantize:
    make = MovingAveragePerChannelMinMaxObserver
    return LearnableFakeQuantize(make, qscheme=torch.per_channel_symmetric, **RANGE | keywords)


def scale_gradient(x: Tensor, scale: Tensor, grad: Tensor, factor: float) -> Tensor:
    """Equation 3 of Esser et al. 2020 in float64, where a value is clamped if its code is."""
    ratio = x.double() / scale.double()
    slope = torch.where(ratio.round() < -8, -8.0, torch.where(ratio.round() > 7, 7.0, ratio.round() - ratio))
    return (slope * grad.double()).sum(-1) * factor


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("use_grad_scaling", [True, False])
def test_the_gradient_of_the_scale(use_grad_scaling: bool, dtype: torch.dtype) -> None:
    x = (torch.randint(-200, 201, (4, 64)) / 16).to(dtype)  # exact in every dtype, and no tie among x / 0.73
    grad = torch.randint(-8, 9, (4, 64)).to(dtype)
    for module, shared in ((per_tensor(use_grad_scaling=use_grad_scaling), 256), (per_channel(
        use_grad_scaling=use_grad_scaling, channel_len=4), 64)):  # fmt: skip
        module.disable_observer()
        module.scale.data.fill_(0.73)
        y = module(x.clone().requires_grad_())
        y.backward(grad)
        factor = (shared * 7) ** -0.5 if use_grad_scaling else 1.0
        expected = scale_gradient(x, torch.tensor(0.73), grad, factor)
        expected = expected.sum().reshape(1) if shared == 256 else expected
        # float32 sums of 256 products of up to 8 * 8, whatever the dtype of x: 256 * 64 * 2**-24, and room for more
        torch.testing.assert_close(module.scale.grad.double(), expected, rtol=1e-5, atol=2e-3 * factor)


def test_values_and_the_gradient_of_x_are_those_of_fake_quantize() -> None:
    learned = per_tensor()
    plain = FakeQuantize(MinMaxObserver, qscheme=torch.per_tensor_symmetric, **RANGE)
    x = torch.randn(50, 8) * 3
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -0.0])
    for batch in (x[:10], x):  # the first sets the scale, the second goes beyond it
        plain.observer_enabled.copy_(learned.observer_enabled)
        mine, theirs = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        y, expected = learned(mine), plain(theirs)
        assert torch.equal(y, expected)
        y.sum().backward()
        expected.sum().backward()
        assert torch.equal(mine.grad, theirs.grad)
    assert learned.observer_enabled == 0
    assert learned.scale.grad.isfinite().all()


def test_the_scale_is_learned_and_does_not_follow_the_data() -> None:
    module = per_tensor()
    x = torch.randn(4000)
    module(x)
    assert torch.equal(module.scale, x.abs().max().reshape(1) / 7.5)
    optimizer = torch.optim.Adam(module.parameters(), 0.01)

    def error() -> Tensor:
        return (module(x) - x).square().mean()

    before = error().item()
    for _ in range(60):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    assert error().item() < 0.85 * before  # 16 codes of a Gaussian gain about a quarter by giving up its tails
    scale = module.scale.detach().clone()
    module(100 * x)
    assert torch.equal(module.scale, scale)
    assert (module.calculate_qparams()[0], module.has_data) == (scale, True)


def test_a_scale_below_zero_comes_back() -> None:
    module = per_tensor()
    x = torch.randn(8)
    module(x)
    module.scale.data.fill_(-1.0)
    assert torch.equal(module(x).abs() <= 8 * module.eps, torch.ones(8, dtype=torch.bool))
    (module(x) - x).square().sum().backward()
    assert module.scale.grad < 0  # a step of gradient descent makes it larger
    assert module.calculate_qparams()[0] == module.eps


@pytest.mark.parametrize("strict", [True, False])
def test_traced_it_learns_alike(strict: bool) -> None:
    eager = per_channel(channel_len=4)
    eager.take_shape(torch.randn(4, 8))
    exported = torch.export.export(copy.deepcopy(eager), (torch.randn(4, 8),), strict=strict).module()
    compiled = copy.deepcopy(eager)
    modules: list[Any] = [eager, exported, compiled]
    calls = [eager, exported, torch.compile(compiled, backend="aot_eager", fullgraph=True)]
    for _ in range(3):
        x = torch.randn(4, 8)
        results = []
        for module, call in zip(modules, calls, strict=True):
            module.scale.grad = None
            call(x).square().sum().backward()
            results.append((module.scale.grad, module.scale.detach(), module.observer_enabled))
        for result in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_the_parameter_keeps_its_identity_and_dtype() -> None:
    module = per_channel()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    module(torch.randn(4, 8)).sum().backward()
    assert optimizer.param_groups[0]["params"][0] is module.scale
    assert module.scale.shape == module.scale.grad.shape == (4,)
    assert nn.Sequential(module).bfloat16()[0].scale.dtype == torch.float32
    loaded = per_channel()
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(loaded.scale, module.scale)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be dynamic"):
        per_tensor(is_dynamic=True)
    with pytest.raises(CalibrationError, match="call the module once before"):
        torch.export.export(per_channel(), (torch.randn(4, 8),), strict=False)
