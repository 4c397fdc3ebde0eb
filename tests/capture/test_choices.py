"""What Python code decides in training is refused, and what passes no gradient is named."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pipeline_run import Do
from qpass.capture.training import capture_training
from qpass.errors import CaptureError

X = torch.randn(4, 6)


def by_tensor(m: nn.Module, x: Tensor) -> Tensor:
    return x if m.training and torch.rand(()) < 0.5 else m.fc(x)


def by_python(m: nn.Module, x: Tensor) -> Tensor:
    return m.fc(x) if not m.training or random.random() < 2 else x


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (by_tensor, "training decides by a value that the model computes or draws"),
        (by_python, "the model draws from Python's random in training"),
    ],
)
def test_a_layer_that_is_skipped_by_python_is_refused(forward: Callable[..., Tensor], message: str) -> None:
    model = Do(forward, fc=nn.Linear(6, 6)).train()
    random.seed(1)
    with pytest.raises(CaptureError, match=message) as caught:
        capture_training(model, (X,))
    assert "skip a layer by a random mask" in str(caught.value)
    assert model.training
    after = random.random()
    random.seed(1)
    assert after == random.random()


def test_a_value_that_evaluation_decides_by_too_keeps_its_error() -> None:
    model = Do(lambda m, x: m.fc(x) if x.sum() > 0 else x, fc=nn.Linear(6, 6)).train()
    with pytest.raises(CaptureError, match=r"torch\.export cannot capture"):
        capture_training(model, (X,))


def test_a_region_that_no_gradient_passes_is_named() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda x: m.fc(x), lambda x: m.fc2(x), (x,))

    model = Do(forward, fc=nn.Linear(6, 6), fc2=nn.Linear(6, 6)).train()
    with pytest.warns(UserWarning, match="no gradient passes cond at "):
        capture_training(model, (X,))
