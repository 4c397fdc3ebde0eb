"""A call with other inputs than the graph holds for: which input, what came, what was captured, how to allow it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qpass
from qpass.errors import InputError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, image: Tensor, shift: Tensor, more: dict[str, Tensor] | None = None) -> Tensor:
        return self.conv(image) + shift


IMAGE, SHIFT = torch.randn(2, 3, 8, 8), torch.zeros(8, dtype=torch.float32)


@pytest.fixture(scope="module")
def prepared() -> Any:
    return qpass.prepare(Net().eval(), (IMAGE, SHIFT))


CASES = [
    (
        (torch.randn(2, 3, 8, 10), torch.zeros(10)), {},
        "input 'image' has the sizes [2, 3, 8, 10], and the model was captured for [any, 3, 8, 8]\n"
        "  to do: to allow it, prepare the model with dynamic_shapes="
        "{'image': {0: Dim.AUTO, 3: Dim.AUTO}, 'shift': {0: Dim.AUTO}} (from torch.export import Dim)",
    ),
    (
        (torch.randn(3, 8, 8), SHIFT), {},
        "input 'image' has the sizes [3, 8, 8], and the model was captured for [any, 3, 8, 8]\n  to do: prepare the",
    ),
    ((IMAGE.double(), SHIFT), {}, "input 'image' is float64, and was float32 when the model was captured\n  to do:"),
    ((IMAGE, 3.0), {}, "input 'shift' is 3.0, and was a tensor when the model was captured"),
    ((IMAGE.numpy(), SHIFT), {}, "input 'image' is a ndarray, and was a tensor when the model was captured"),
    ((IMAGE,), {}, "the call does not fit the model's arguments: missing a required argument: 'shift'\n  to do:"),
    (([IMAGE, IMAGE], SHIFT), {}, "the inputs of this call hold 3 values, and the model was captured with 2"),
]  # fmt: skip


@pytest.mark.parametrize(("args", "kwargs", "message"), CASES)
def test_the_input_is_named(prepared: Any, args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message)):
        prepared(*args, **kwargs)


def test_what_it_advises_works() -> None:
    shapes = {"image": {0: Dim.AUTO, 3: Dim.AUTO}, "shift": {0: Dim.AUTO}}
    model = Net().eval()
    allowing = qpass.prepare(model, (IMAGE, SHIFT), dynamic_shapes=shapes)
    wider = (torch.randn(2, 3, 8, 10), torch.zeros(10))
    assert torch.equal(allowing(*wider), model(*wider))


def test_a_refused_batch_leaves_no_trace_in_the_ranges() -> None:
    prepared = qpass.prepare(nn.Linear(4, 4).eval(), (torch.randn(2, 4),))
    prepared(torch.ones(2, 4))
    observer = prepared.activation_post_process_0  # of the input; a weight is the same for every batch
    before = {name: value.clone() for name, value in observer.state_dict().items()}
    for wrong in (torch.full((2, 3, 4), 1e6), torch.full((2, 4), 1e6).double()):
        with pytest.raises(InputError):
            prepared(wrong)
    assert all(torch.equal(value, before[name]) for name, value in observer.state_dict().items())


def test_an_error_of_the_model_s_own_stays_what_it_is() -> None:
    class Checks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Embedding(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(ids)

    prepared = qpass.prepare(Checks().eval(), (torch.zeros(2, dtype=torch.long),), config="int8_weight_only")
    with pytest.raises(IndexError, match="index out of range"):
        prepared(torch.full((2,), 9))


def test_compiled_it_is_the_same_error(prepared: Any) -> None:
    prepared(IMAGE, SHIFT)
    quantized = qpass.convert(prepared)
    compiled = torch.compile(quantized, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(IMAGE, SHIFT), quantized(IMAGE, SHIFT))
        with pytest.raises(InputError, match=r"input 'image' has the sizes \[2, 3, 8, 10\]"):
            compiled(torch.randn(2, 3, 8, 10), torch.zeros(10))
