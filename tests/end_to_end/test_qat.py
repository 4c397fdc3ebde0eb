"""Quantization-aware training, from a model in training mode to its int8 kernels, on models of every kind of mode."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

import qpass
from kernel_comparison import compare_kernels
from pipeline_run import Do, kernel_names
from qpass.fake_quantize import disable_fake_quant, freeze_batch_norm_stats, freeze_observers
from qpass.ir.training_modules import BatchNorm, Dropout, TrainingModule
from qpass.presets import int8_qat

QAT = int8_qat(compute_dtype=None)


def conv_net(depth: int = 2, channels: int = 8) -> nn.Module:
    """Convolutions of every form with a norm of its own eps and momentum behind each, and dropout."""
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels, eps=1e-3, momentum=0.3), nn.ReLU()]
    for index in range(depth):
        groups = channels if index % 2 else 1
        layers += [nn.Conv2d(channels, channels, 3, padding=1, groups=groups, bias=bool(index % 2))]
        activation = nn.Hardswish() if index % 2 else nn.ReLU()
        layers += [nn.BatchNorm2d(channels, momentum=0.2), activation, nn.Dropout2d(0.1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(channels, 4))


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)


def mixed() -> nn.Module:
    """A shared convolution with two norms, a norm behind a linear, one behind nothing, a residual, no statistics."""
    members = {
        "conv": nn.Conv1d(6, 6, 3, padding=1), "norm1": nn.BatchNorm1d(6), "norm2": nn.BatchNorm1d(6, affine=False),
        "norm3": nn.BatchNorm1d(6, track_running_stats=False), "fc": nn.Linear(8, 8), "head": nn.Linear(48, 5),
        "norm4": nn.BatchNorm1d(5),
    }  # fmt: skip

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.norm3(x)
        x = m.norm1(m.conv(x)) + m.norm2(m.conv(x))
        x = x + F.dropout(m.fc(torch.relu(x)), 0.2, m.training)
        return m.norm4(m.head(x.flatten(1)))

    return Do(forward, **members)


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv net": (conv_net, (4, 3, 8, 8)), "transformer": (transformer, (4, 5, 16)), "mixed": (mixed, (4, 6, 8)),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)


def settled(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    """A model in training mode whose norms have seen some batches."""
    build, shape = MODELS[name]
    model = build().train()
    for _ in range(3):
        model(torch.randn(shape))
    return model, shape


def trained(prepared: fx.GraphModule, shape: tuple[int, ...], steps: int = 3) -> fx.GraphModule:
    """Some steps of training; the loss pulls every output to 1."""
    optimizer = torch.optim.SGD(prepared.train().parameters(), 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        (prepared(torch.randn(shape)) - 1).square().mean().backward()
        optimizer.step()
    return prepared


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return model(x)


@every_model
def test_with_rounding_off_it_is_the_float_model_bit_for_bit_in_both_modes(name: str) -> None:
    model, shape = settled(name)
    before, prepared = state(model), qpass.prepare(model, (torch.randn(shape),), config=QAT)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert prepared.training
    prepared.apply(disable_fake_quant)
    for training in (True, False, True, True, False):
        prepared.train(training), model.train(training)
        x = torch.randn(shape)
        y, expected = seeded(prepared, x), seeded(model, x)
        assert torch.equal(y, expected)
        if training:
            gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
            own = dict(zip(dict(prepared.named_parameters()), torch.autograd.grad(
                y.square().sum(), list(prepared.parameters())), strict=True))  # fmt: skip
            for (key, _), gradient in zip(model.named_parameters(), gradients, strict=True):
                # the gradient of a scaled weight takes another route: roundings of 2**-24 of sums of up to 200
                torch.testing.assert_close(own[key], gradient, atol=1e-4, rtol=1e-4)
    kept = prepared.state_dict()
    for key, tensor in model.state_dict().items():
        if key in kept:  # a constant that no operator reads is not kept
            assert torch.equal(kept[key], tensor), key


@every_model
def test_convert_is_a_snapshot_of_what_evaluation_computes(name: str) -> None:
    model, shape = settled(name)
    prepared = trained(qpass.prepare(model, (torch.randn(shape),), config=QAT), shape)
    before = state(prepared)
    quantized = qpass.convert(prepared)
    assert prepared.training
    assert all(torch.equal(tensor, before[key]) for key, tensor in prepared.state_dict().items())
    x = torch.randn(shape)
    expected = prepared.eval()(x)
    assert torch.equal(quantized(x), expected)  # the same codes, the same float operations
    trained(prepared, shape)
    assert torch.equal(quantized(x), expected)
    assert not torch.equal(qpass.convert(prepared)(x), expected)


@every_model
def test_the_codes_run_on_the_kernels(name: str) -> None:
    model, shape = settled(name)
    quantized = qpass.convert(trained(qpass.prepare(model, (torch.randn(shape),), config=QAT), shape))
    report = qpass.report(quantized)
    assert not any(isinstance(module, TrainingModule) for module in quantized.modules())
    compare_kernels(quantized, torch.randn(shape))
    float32 = qpass.presets.int8_static(compute_dtype=None)  # as in training: a kernel that casts has another name
    float_model = qpass.prepare(copy.deepcopy(model).eval(), (torch.randn(shape),), config=float32)
    float_model(torch.randn(shape))
    plain = qpass.convert(float_model)
    assert kernel_names(qpass.lower(quantized)) == kernel_names(qpass.lower(plain))  # training hides no fusion
    assert "quantized for x86" in str(report)


def test_eps_momentum_and_p_are_the_models_own_from_first_to_last() -> None:
    model, shape = settled("conv net")
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]
    drops = [module.p for module in model if isinstance(module, nn.Dropout | nn.Dropout2d)]

    def check(gm: fx.GraphModule) -> None:
        found = [module for module in gm.modules() if isinstance(module, BatchNorm)]
        assert [(norm.eps, norm.momentum) for norm in found] == [(norm.eps, norm.momentum) for norm in norms]
        assert [module.p for module in gm.modules() if isinstance(module, Dropout)] == drops

    prepared = qpass.prepare(model, (torch.randn(shape),), config=QAT)
    check(prepared)
    check(trained(prepared, shape))
    check(prepared.eval())
    qpass.convert(prepared)
    check(prepared)
    assert [(norm.eps, norm.momentum) for norm in norms] == [(1e-3, 0.3), (1e-5, 0.2), (1e-5, 0.2)]


def test_training_lowers_the_loss_and_moves_the_running_statistics() -> None:
    model, shape = settled("conv net")
    prepared = qpass.prepare(model, (torch.randn(shape),), config=QAT)
    x, mean = torch.randn(shape), prepared.state_dict()["1.running_mean"].clone()

    def loss() -> float:
        return (prepared.eval()(x) - 1).square().mean().item()

    trained(prepared, shape, steps=1)
    start = loss()
    trained(prepared, shape, steps=30)
    assert loss() < start / 2
    assert not torch.equal(prepared.state_dict()["1.running_mean"], mean)
    assert prepared.state_dict()["1.num_batches_tracked"] == model[1].num_batches_tracked + 31


def test_schedules_freeze_ranges_and_statistics() -> None:
    model, shape = settled("conv net")
    prepared = trained(qpass.prepare(model, (torch.randn(shape),), config=QAT), shape)
    freeze_observers(prepared)
    freeze_batch_norm_stats(prepared)
    before, x = state(prepared), torch.randn(shape) * 5
    prepared.train()(x)
    for key, tensor in prepared.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    for drop in (module for module in prepared.modules() if isinstance(module, Dropout)):
        drop.eval()
    assert torch.equal(prepared(x), prepared.eval()(x))  # training now computes what evaluation does
