from __future__ import annotations

import math
from collections import UserDict

import pytest
import torch
from torch import nn

import qpass
from pipeline_run import Do
from qpass.errors import InputError, QpassError
from qpass.inspect.sqnr import sqnr


def returns(*outputs: object):
    """A model that returns these, whatever it is given."""
    return lambda *args, **kwargs: outputs[0] if len(outputs) == 1 else outputs


def test_the_formula() -> None:
    reference, other = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    # 10 log10((9 + 16) / 0.25) = 20 dB; exact in float64 but for the logarithms' last bit
    assert sqnr(returns(reference), returns(other), (reference,)) == pytest.approx(20.0, abs=1e-12)


def test_all_outputs_and_batches_are_summed_before_the_ratio() -> None:
    def a(x):
        return {"big": 10 * x, "small": (x,)}

    def b(x):
        return {"big": 10 * x + 1, "small": (x,)}

    batches = [torch.ones(2), torch.zeros(2)]
    # signal 2 * 100 + 2 * 1, noise 2 + 2; a mean of ratios per output or per batch would be infinite
    assert sqnr(a, b, batches) == pytest.approx(10 * math.log10(202 / 4), abs=1e-12)


def test_equal_outputs_are_infinitely_good() -> None:
    assert sqnr(torch.sin, torch.sin, (torch.randn(5),)) == math.inf
    assert sqnr(returns(torch.zeros(3)), returns(torch.zeros(3)), (1,)) == math.inf


def test_noise_on_silence_is_infinitely_bad() -> None:
    assert sqnr(returns(torch.zeros(3)), returns(torch.ones(3)), (1,)) == -math.inf


def test_float64_is_used_where_float32_would_see_no_noise_or_overflow() -> None:
    large = torch.full((4,), 1e30)
    # squares of 1e30 overflow float32; a hundredth of the amplitude is 40 dB, within float32's rounding of the inputs
    assert sqnr(returns(large), returns(large * 1.01), (1,)) == pytest.approx(40.0, abs=1e-4)
    fine = torch.ones(4, dtype=torch.float64)  # 1e-10 of the amplitude is 200 dB; in float32 the two are equal
    assert sqnr(returns(fine), returns(fine + 1e-10), (1,)) == pytest.approx(200.0, abs=1e-4)


@pytest.mark.parametrize(
    "batch", [torch.ones(2, 3), (torch.ones(2, 3),), {"input": torch.ones(2, 3)}, UserDict(input=torch.ones(2, 3))]
)
def test_a_batch_is_a_tensor_arguments_or_keywords(batch: object) -> None:
    linear = nn.Linear(3, 2)
    assert sqnr(linear, linear, batch) == math.inf
    assert sqnr(linear, linear, [batch, batch]) == math.inf


def test_complex_and_integer_outputs_count_too() -> None:
    # |3 + 4i|^2 = 25 and one code off by one among codes 3 and 4: (25 + 25) / (0 + 1)
    reference = (torch.tensor([3 + 4j]), torch.tensor([3, 4]))
    other = (torch.tensor([3 + 4j]), torch.tensor([3, 5]))
    assert sqnr(returns(*reference), returns(*other), (1,)) == pytest.approx(10 * math.log10(50), abs=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_without_a_ratio_are_named(bad: float) -> None:
    good, spoiled = torch.ones(4), torch.tensor([1.0, bad, 1.0, bad])
    message = (
        "output 0 of {} holds 2 of 4 values that are nan or infinite, and noise has no ratio to those\n"
        "  to do: find the operation that makes them, or compare models that return finite values only"
    )
    with pytest.raises(QpassError) as raised:
        sqnr(returns(spoiled), returns(spoiled), (1,))
    assert str(raised.value) == message.format("the reference")
    with pytest.raises(QpassError) as raised:
        sqnr(returns(good), returns(spoiled), (1,))
    assert str(raised.value) == message.format("the compared model")


def test_overflow_is_an_error_and_not_nan() -> None:
    huge = torch.full((2,), 1e200, dtype=torch.float64)
    with pytest.raises(QpassError, match="the sum of squares of output 0 of the reference holds 1 of 1"):
        sqnr(returns(huge), returns(huge * 1.1), (1,))


def test_outputs_that_do_not_correspond_are_refused() -> None:
    with pytest.raises(InputError) as raised:
        sqnr(returns(torch.ones(2, 1)), returns(torch.ones(2)), (1,))  # would broadcast to [2, 2]
    assert str(raised.value) == (
        "the outputs do not correspond: shapes [(2, 1)] of the reference and [(2,)] of the compared model\n"
        "  to do: compare two forms of one model, on the same inputs"
    )


@pytest.mark.parametrize(("output", "inputs"), [(torch.ones(1), []), ("no tensor", (1,))])
def test_nothing_to_compare_is_an_error(output: object, inputs: object) -> None:
    with pytest.raises(InputError, match="there is nothing to compare: no batch, or no tensor in the outputs"):
        sqnr(returns(output), returns(output), inputs)


def test_no_gradient_is_recorded() -> None:
    recorded = []

    def model(x: torch.Tensor) -> torch.Tensor:
        recorded.append(torch.is_grad_enabled())
        return x

    sqnr(model, model, (torch.ones(1, requires_grad=True),))
    assert recorded == [False, False]


class Writes(nn.Module):
    """Writes to its input, a buffer, a list of tensors and an attribute that it replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros(1))
        self.register_buffer("window", torch.zeros(2, 4))
        self.kept, self.last = [torch.zeros(4)], None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        self.calls += 1
        self.kept[0].add_(x[0])
        self.window = torch.roll(self.window, 1, 0) + x[:2]
        self.last = x.sum() if self.last is None else self.last + x.sum()
        return self.linear(x) * self.calls + self.kept[0] + self.window.sum() + self.last


def test_a_measurement_leaves_models_and_inputs_as_they_were() -> None:
    model, x = Writes(), torch.ones(3, 4)
    same = Writes()
    same.load_state_dict(model.state_dict())
    buffers = dict(model.named_buffers())
    for _ in range(2):
        assert sqnr(model, same, [(x,), (x,)]) == math.inf
        assert torch.equal(x, torch.ones(3, 4))
        assert all(buffer is buffers[name] and not buffer.any() for name, buffer in model.named_buffers())
        assert not model.kept[0].any()
        assert model.last is None


def test_a_measurement_of_nodes_leaves_models_and_inputs_as_they_were() -> None:
    def counted(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        m.calls.add_(1)
        y = m.linear(x)
        x.mul_(2)
        return y * m.calls

    model, x = Do(counted, linear=nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    model.register_buffer("calls", torch.zeros(1))
    quantized = qpass.convert(qpass.prepare(model, (x,), config="int8_weight_only"))
    before = x.clone()
    first, second = (sqnr(model, quantized, (x,), nodes=True).worst() for _ in range(2))
    assert torch.equal(x, before)
    assert not model.calls.any()
    assert [found.sqnr for found in first] == [found.sqnr for found in second]
    assert all(not buffer.any() for name, buffer in quantized.named_buffers() if name == "calls")
