"""A random mask or noise of training alone becomes a branch of the graph of evaluation; anything else is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interpret import operators
from pipeline_run import Do
from qpass.capture.training import capture_training
from qpass.errors import CaptureError
from qpass.ir.branch import Branch
from qpass.ir.training_modules import BY_MODE, TrainingChange

X = torch.randn(4, 6)


def drop_path(m: nn.Module, x: Tensor, p: float = 0.4) -> Tensor:
    return x.div(1 - p) * x.new_empty(x.shape[0], 1).bernoulli_(1 - p) if m.training else x


def test_the_graph_is_that_of_evaluation_with_a_branch_that_draws() -> None:
    model = Do(lambda m, x: x + drop_path(m, m.fc(x)), fc=nn.Linear(6, 6)).train()
    gm = capture_training(model, (X,))
    assert (
        operators(gm)
        == """\
inputs_0 = input
linear = linear(inputs_0, fc.weight, fc.bias)
branch_0 = branch_0(linear, inputs_0)
add = add.Tensor(inputs_0, branch_0)
return [add]"""
    )
    (call,) = gm.graph.find_nodes(op="call_module")
    assert call.meta[BY_MODE] == TrainingChange(True)
    branch = gm.get_submodule("branch_0")
    assert isinstance(branch, Branch)
    assert (
        operators(branch.body)
        == """\
x_0 = input
x_1 = input
div = div.Tensor(x_0, 0.6)
new_empty = new_empty(x_0, [sym_size_int_1, 1], pin_memory=False)
bernoulli_ = bernoulli_.float(new_empty, 0.6)
mul = mul.Tensor(div, bernoulli_)
return mul"""
    )


def shared_mask(m: nn.Module, x: Tensor) -> Tensor:
    y, z = m.fc(x), m.fc2(x)
    if m.training:
        mask = torch.rand(x.shape[0], 1).floor()
        y, z = y * mask, z * mask
    return y + torch.relu(z)


def drawn_early(m: nn.Module, x: Tensor) -> Tensor:
    mask = torch.rand(x.shape[0], 1) if m.training else None
    y = F.dropout(m.fc(x), 0.1, m.training)
    y = torch.relu(y)
    return torch.relu(y if mask is None else y * mask)


def counted(m: nn.Module, x: Tensor) -> Tensor:
    if m.training:
        m.mean.lerp_(x.mean(0), 0.1)
    return m.fc(x)


def written(m: nn.Module, x: Tensor) -> Tensor:
    if m.training:
        x.add_(torch.randn_like(x))
    return m.fc(x)


def scaled_in_evaluation(m: nn.Module, x: Tensor) -> Tensor:
    y = m.fc(x)
    return y * torch.rand(x.shape[0], 1) if m.training else y * 0.5


def another_output(m: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = drop_path(m, m.fc(x))
    return (torch.relu(y), m.fc2(x)) if m.training else (torch.relu(y),)


def another_literal(m: nn.Module, x: Tensor) -> Tensor:
    return m.fc(x) * (torch.tensor(2.0) if m.training else torch.tensor(3.0))


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (shared_mask, "rand is drawn in training only, and changes two values"),
        (drawn_early, "dropout follows a random draw whose value is used after it"),
        (counted, "computes something else in training than in evaluation: lerp_"),
        (written, "add_.Tensor overwrites in training a value"),
        (scaled_in_evaluation, "computes something else in training than in evaluation: rand"),
        (another_output, "computes something else in training than in evaluation: linear"),
        (another_literal, "computes something else in training than in evaluation: lift_fresh_copy"),
    ],
)
def test_what_is_no_branch_is_refused_by_its_operator(forward: Callable[..., Tensor], message: str) -> None:
    model = Do(forward, fc=nn.Linear(6, 6), fc2=nn.Linear(6, 6)).train()
    model.register_buffer("mean", torch.zeros(6))
    with pytest.raises(CaptureError) as caught:
        capture_training(model, (X,))
    assert message in str(caught.value)
    assert model.training
    assert torch.equal(model.mean, torch.zeros(6))


def test_a_size_that_is_fixed_in_training_only_is_refused() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.fc(x)
        return x * torch.rand(4, 1) if m.training else x

    with pytest.raises(CaptureError, match="of any size in evaluation and only of size 4 in training"):
        capture_training(Do(forward, fc=nn.Linear(6, 6)), (X,))
