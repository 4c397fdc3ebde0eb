"""Batch norms of a prepared model stand where the model's stood, and are frozen by whatever freezes those."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from pipeline_run import Do
from qpass.fake_quantize import disable_fake_quant, freeze_batch_norm_stats, freeze_bn_stats

X = torch.randn(4, 3, 8, 8)
QAT = qpass.presets.int8_qat(compute_dtype=None)


def by_path(p: nn.Module) -> None:
    p.get_submodule("body.1").eval()


def by_container(p: nn.Module) -> None:
    p.get_submodule("body").eval()


def by_base(p: nn.Module) -> None:
    for m in p.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eval()


def by_type(p: nn.Module) -> None:
    for m in p.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eval()
            m.weight.requires_grad_(False)
            m.bias.requires_grad_(False)


def by_momentum(p: nn.Module) -> None:
    for m in p.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 0.0


FREEZES: dict[str, Callable[[nn.Module], Any]] = {
    "path": by_path, "container": by_container, "base": by_base, "type": by_type,
    "qpass": freeze_batch_norm_stats, "apply": lambda p: p.apply(freeze_bn_stats),
}  # fmt: skip


def model() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.3), nn.ReLU())
    made = nn.Sequential()
    made.add_module("body", body)
    made.add_module("head", nn.Conv2d(8, 2, 3))
    return made.train()


def statistics(m: nn.Module) -> list[Tensor]:
    return [tensor.clone() for name, tensor in m.state_dict().items() if "running" in name or "tracked" in name]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("way", FREEZES)
def test_statistics_stay_and_are_used(way: str) -> None:
    prepared = qpass.prepare(model(), (X,), config=QAT)
    prepared(X * 2 + 1)
    FREEZES[way](prepared)
    before = statistics(prepared)
    assert len(before) == 3
    y = prepared(X)
    y.sum().backward()
    assert equal(statistics(prepared), before)
    for m in prepared.modules():
        if hasattr(m, "disable_observer"):
            m.disable_observer()
    assert torch.equal(prepared(X), copy.deepcopy(prepared).eval()(X))  # the folded form, factor and bias with it


def test_frozen_by_type_it_is_the_frozen_float_model() -> None:
    float_model = model()
    prepared = qpass.prepare(float_model, (X,), config=QAT)
    prepared.apply(disable_fake_quant)
    for m in (float_model, prepared):
        m(X * 2 + 1)
        by_type(m)
        m(X).square().sum().backward()
    expected = dict(float_model.named_parameters())
    found = dict(prepared.named_parameters())
    assert list(found) == list(expected)
    for name, parameter in expected.items():
        same = parameter.grad is found[name].grad or torch.equal(parameter.grad, found[name].grad)
        assert same, name
    assert expected["body.1.weight"].grad is None
    by_momentum(prepared.train())
    before = prepared.get_buffer("body.1.running_mean").clone()
    prepared(X + 3)
    assert torch.equal(prepared.get_buffer("body.1.running_mean"), before)


class Held(nn.Sequential):
    """Keeps its batch norms frozen in its own ``train``, as detection backbones do."""

    def train(self, mode: bool = True) -> Held:
        super().train(mode)
        by_base(self)
        return self


def test_what_the_models_own_train_leaves_frozen_stays_frozen() -> None:
    for kind, moves in ((Held, False), (nn.Sequential, True)):
        prepared = qpass.prepare(kind(*model()).train(), (X,), config=QAT)
        outer = nn.Sequential(prepared)
        for switch in (prepared.train, copy.deepcopy(prepared).train, outer.train):
            gm = switch()
            before = statistics(gm)
            gm(X + 3)
            assert equal(statistics(gm), before) is not moves
        prepared.get_submodule("0.1").train()  # by hand, as in the model
        before = statistics(prepared)
        prepared(X + 3)
        assert not equal(statistics(prepared), before)


def test_conversion_leaves_the_norms_of_the_prepared_model_alone() -> None:
    prepared = qpass.prepare(model(), (X,), config=QAT)
    prepared(X)
    norm, keys = prepared.get_submodule("body.1"), list(prepared.state_dict())
    quantized = qpass.convert(prepared)
    assert prepared.get_submodule("body.1") is norm
    assert list(prepared.state_dict()) == keys
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in quantized.modules())
    prepared.eval()
    with torch.no_grad():
        assert torch.equal(quantized(X), prepared(X))
    other = qpass.prepare(model(), (X,), config=QAT).eval()
    other.load_state_dict(prepared.state_dict())
    assert torch.equal(other(X), prepared(X))


def shared(m: Any, x: Tensor) -> Tensor:
    result: Tensor = m.norm(m.a(x)) + m.norm(torch.relu(m.b(x))) + m.again(m.a(x))
    return result


def test_one_norm_called_at_three_places_is_one_module() -> None:
    norm = nn.BatchNorm2d(4)
    float_model = Do(shared, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3), norm=norm, again=norm).train()
    prepared = qpass.prepare(float_model, (X,), config=QAT)
    assert isinstance(prepared, fx.GraphModule)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in prepared.modules()) == 1
    prepared.apply(disable_fake_quant)
    for m in (float_model, prepared):
        m(X)
    assert equal(statistics(prepared), [norm.running_mean, norm.running_var, norm.num_batches_tracked])
    assert norm.num_batches_tracked == 3
    by_base(prepared)
    before = statistics(prepared)
    prepared(X + 3)
    assert equal(statistics(prepared), before)
