"""Quantization-aware training of models that draw masks or noise in training: stochastic depth in every spelling."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from pipeline_run import Do
from qpass.fake_quantize import disable_fake_quant
from qpass.ir.training_modules import TrainingModule
from qpass.presets import int8_qat

QAT = int8_qat(compute_dtype=None)
X = torch.randn(8, 6)


def divided_first(x: Tensor) -> Tensor:
    return x.div(0.6) * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6)


def mask_scaled(x: Tensor) -> Tensor:
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.6)
    mask.div_(0.6)
    return x * mask


def mask_of_empty(x: Tensor) -> Tensor:
    noise = torch.empty([x.shape[0], 1], dtype=x.dtype, device=x.device)
    noise = noise.bernoulli_(0.6)
    return x * noise.div_(0.6)


def floor_of_rand(x: Tensor) -> Tensor:
    keep = 0.6 + torch.rand([x.shape[0], 1], dtype=x.dtype, device=x.device)
    return x / 0.6 * keep.floor()


def chosen(x: Tensor) -> Tensor:
    return torch.where(torch.rand(x.shape[0], 1) < 0.6, x / 0.6, torch.zeros_like(x))


def noise(x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = x.std() * torch.tensor(0.1)
    return x + torch.randn_like(x) * scale


def noise_in_place(x: Tensor) -> Tensor:
    x += torch.randn_like(x)
    return x


def mixed_up(x: Tensor) -> Tensor:
    return 0.7 * x + 0.3 * x[torch.randperm(x.shape[0])]


class Random(nn.Module):
    """Changes its input in training only."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x) if self.training else x


class Block(nn.Module):
    """A residual block; the dropout draws between the two branches."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc1, self.fc2, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.path1, self.drop, self.path2 = Random(change), nn.Dropout(0.2), Random(change)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.path1(self.fc1(torch.relu(x)))
        return x + self.path2(self.drop(self.norm(self.fc2(x))))


def draw(model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of all parameters, at one seed."""
    torch.manual_seed(1)
    y = model(x)
    return y, list(torch.autograd.grad(y.square().sum(), list(model.parameters())))


CHANGES = [
    divided_first, mask_scaled, mask_of_empty, floor_of_rand, chosen, noise, noise_in_place, mixed_up,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_it_trains_as_the_float_model_and_converts_without(change: Callable[[Tensor], Tensor]) -> None:
    model = nn.Sequential(nn.Linear(6, 6), Block(change)).train()
    prepared = qpass.prepare(model, (X,), config=QAT)
    random = {
        name for name, module in prepared.named_modules() if isinstance(module, TrainingModule) and name != "1.norm"
    }
    assert random == {"1.path1", "1.drop", "1.path2"}
    exact = copy.deepcopy(prepared).apply(disable_fake_quant)
    for training in (True, False, True):
        x = torch.randn(5, 6)  # of another size than the example
        y, gradients = draw(exact.train(training), x)
        expected, own = draw(model.train(training), x)
        assert torch.equal(y, expected)
        assert all(map(torch.equal, gradients, own))
    draws = [prepared.train()(X) for _ in range(8)]  # masks of 8 rows, equal by chance in one of 6**8 pairs
    assert not any(torch.equal(draws[0], other) for other in draws[1:])
    quantized = qpass.convert(prepared)
    assert not any(isinstance(module, TrainingModule) for module in quantized.modules())
    assert torch.equal(quantized(X), prepared.eval()(X))  # the same codes, the same float operations


def quantized_operations(prepared: fx.GraphModule) -> list[str]:
    return sorted(str(node.target) for node in qpass.convert(prepared).graph.nodes if node.op == "call_function")


def test_what_is_quantized_is_what_is_quantized_without_it() -> None:
    model, plain = Block(mask_scaled).train(), Block(lambda x: x).train()
    plain.load_state_dict(model.state_dict())
    prepared, other = (qpass.prepare(each, (X,), config=QAT) for each in (model, plain))
    for each in (prepared, other):
        each.train()(X)
    assert quantized_operations(prepared) == quantized_operations(other)


def test_a_branch_beside_its_own_source_and_one_that_is_called_twice() -> None:
    path = Random(mask_scaled)
    model = Do(lambda m, x: (y := m.fc(x)) + m.path(m.path(y)), fc=nn.Linear(6, 6), path=path).train()
    prepared = qpass.prepare(model, (X,), config=QAT)
    exact = copy.deepcopy(prepared).apply(disable_fake_quant)
    for training in (True, False):
        y, _ = draw(exact.train(training), X)
        assert torch.equal(y, draw(model.train(training), X)[0])
    prepared.train()(X)
    assert torch.equal(qpass.convert(prepared)(X), prepared.eval()(X))


def test_a_probability_of_the_models_own() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.fc(x)
        if m.training:
            keep = torch.sigmoid(m.logit)
            x = x * torch.bernoulli(keep.detach().expand(x.shape[0], 1)) / keep
        return m.fc2(x)

    model = Do(forward, fc=nn.Linear(6, 6), fc2=nn.Linear(6, 6)).train()
    model.logit = nn.Parameter(torch.tensor(0.5))
    prepared = qpass.prepare(model, (X,), config=QAT)
    assert "logit" in dict(prepared.named_parameters())
    exact = copy.deepcopy(prepared).apply(disable_fake_quant)
    gradients = dict(zip(dict(exact.named_parameters()), draw(exact, X)[1], strict=True))
    for (name, _), expected in zip(model.named_parameters(), draw(model, X)[1], strict=True):
        assert torch.equal(gradients[name], expected), name
    prepared.train()(X)
    assert torch.equal(qpass.convert(prepared)(X), prepared.eval()(X))


def test_eval_on_what_holds_dropout_stops_it() -> None:
    """Each stands where the model's stood: in a module, in a call of the module's own, and inside attention."""

    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(self.fc(x), 0.5, self.training)

    body = nn.Sequential(
        nn.Linear(6, 6), nn.Dropout(0.5), Functional(), Block(mask_scaled),
        nn.TransformerEncoderLayer(6, 2, 6, dropout=0.3),
    )  # fmt: skip
    model = nn.ModuleDict({"backbone": body, "head": nn.Linear(6, 6)})
    model.forward = lambda x: model["head"](model["backbone"](x))  # type: ignore[method-assign]
    prepared = qpass.prepare(model.train(), (X,), config=QAT)
    held = [name for name, module in prepared.named_modules() if isinstance(module, TrainingModule)]
    assert [name for name in held if not name.startswith("backbone.")] == []
    assert {"backbone.1", "backbone.2.dropout_0", "backbone.3.path1", "backbone.3.drop"} <= set(held)
    assert "backbone.4.self_attn.attention_0" in held
    prepared.apply(qpass.fake_quantize.disable_observer)
    assert not torch.equal(prepared(X), prepared(X))
    prepared.get_submodule("backbone").eval()
    assert torch.equal(prepared(X), prepared(X))
    prepared.train()
    assert not torch.equal(prepared(X), prepared(X))


def test_the_state_dict_holds_nothing_of_it() -> None:
    model = Block(mask_scaled).train()
    keys = set(qpass.prepare(model, (X,), config=QAT).state_dict())
    assert {key for key in keys if "activation_post_process" not in key} == set(model.state_dict())
