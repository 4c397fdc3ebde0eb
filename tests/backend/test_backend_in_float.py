"""A float model that the backend leaves in float: one warning or error a compiled model, and what its report says."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import qpass
from qpass.errors import InputError, QpassWarning
from qpass.presets import int8_dynamic

DYNAMIC = qpass.backend(int8_dynamic(compute_dtype=None))
X = torch.randn(4, 32)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def net(kind: Callable[..., nn.Module] = nn.Sequential) -> nn.Module:
    return kind(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()


class NoGrad(nn.Sequential):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Breaks(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = self[0](x)
        torch._dynamo.graph_break()
        return self[2](x)


class PartlyNoGrad(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self[0](x)
        return self[2](x)


def told(run: Callable[[], Any]) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = run()
    return result, [str(one.message) for one in found if issubclass(one.category, QpassWarning)]


@pytest.mark.parametrize("kind", [nn.Sequential, Breaks, PartlyNoGrad])
def test_gradients_left_on_are_told_once(kind: type) -> None:
    model = net(kind)
    compiled = torch.compile(model, backend=DYNAMIC)
    results, messages = told(lambda: [compiled(x) for x in (X, X, torch.randn(6, 32))])  # the last compiles again
    # compiled float sums of 32 products in another order
    torch.testing.assert_close(results[0], model(X), rtol=1e-5, atol=1e-5)
    assert results[0].requires_grad
    assert len(messages) == 1
    assert messages[0].startswith("qpass left a compiled graph in float: gradients are on: call it under torch.no_grad")
    with pytest.raises(InputError, match=r"run it once under torch\.no_grad"):
        qpass.report(compiled)


def test_a_forward_without_gradients_is_quantized_where_they_are_on() -> None:
    model = net(NoGrad)
    compiled = torch.compile(model, backend=DYNAMIC)
    result, messages = told(lambda: compiled(X))
    assert (messages, result.requires_grad, torch.is_grad_enabled()) == ([], False, True)
    quantized = qpass.convert(qpass.prepare(model, (X,), config=int8_dynamic(compute_dtype=None)))
    # the int8 products are exact, the float sums behind them differ by their order
    torch.testing.assert_close(result, quantized(X), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(result, model(X), atol=1e-5)
    assert qpass.report(compiled).count("lowered", "quantized") == 2


def test_a_static_config_is_refused_with_gradients_too() -> None:
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode, pytest.raises(BackendCompilerFailed, match="a static configuration needs calibration"):
            torch.compile(net(), backend=qpass.backend("int8_static"))(X)


def test_a_prepared_model_is_compiled_as_it_is_with_a_warning() -> None:
    model = net()
    prepared = qpass.prepare(model, (X,))
    compiled = torch.compile(prepared, backend=DYNAMIC)
    with torch.no_grad():
        result, messages = told(lambda: compiled(X))
        torch.testing.assert_close(result, model(X), rtol=1e-5, atol=1e-5)
    assert messages == [
        "qpass left a compiled graph in float: the model is prepared and not converted: "
        "call qpass.convert on it, and compile the result"
    ]
    with pytest.raises(InputError, match=r"it is prepared and not converted: call qpass\.convert"):
        qpass.report(compiled)


def test_a_model_for_training_is_trained_in_silence() -> None:
    prepared = qpass.prepare(net().train(), (X,), config="int8_qat")
    for model in (prepared, net().train(), net(Breaks).train()):
        _, messages = told(lambda model=model: torch.compile(model, backend=DYNAMIC)(X).sum().backward())
        assert messages == []


def report_or_error(compiled: nn.Module) -> str:
    try:
        return str(qpass.report(compiled))
    except InputError as error:
        return str(error)


def test_the_report_of_a_model_that_dynamo_skips_says_so() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.out = nn.GRU(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0])

    compiled = torch.compile(Recurrent().eval(), backend=DYNAMIC)
    with torch.no_grad():
        compiled(torch.randn(3, 2, 8))
    said = report_or_error(compiled)  # torch 2.15 compiles what stands around the GRU
    assert re.search(r"skips what holds an nn\.LSTM, nn\.GRU or nn\.RNN.*allow_rnn = True|1 of 1 lowered", said)
    with torch._dynamo.config.patch(allow_rnn=True), torch.no_grad():  # what it advises works
        torch._dynamo.reset()
        compiled = torch.compile(Recurrent().eval(), backend=DYNAMIC)
        compiled(torch.randn(3, 2, 8))
        assert qpass.report(compiled).count("lowered", "quantized") == 1


@torch.no_grad()
def test_under_autocast_a_compiled_model_has_the_dtype_of_the_eager_one_and_says_why_it_is_float() -> None:
    model = net()
    converted = qpass.convert(qpass.prepare(model, (X,), config=int8_dynamic(compute_dtype=None)))
    for one, backend in ((model, DYNAMIC), (converted, DYNAMIC), (converted, qpass.backend("int8_static"))):
        compiled = torch.compile(one, backend=backend)
        with torch.autocast("cpu", torch.bfloat16):
            results, messages = told(lambda one=one, compiled=compiled: (one(X), compiled(X), compiled(X)))
        assert [result.dtype for result in results] == [torch.bfloat16] * 3
        # bfloat16 keeps 8 bits, and the two sum 32 products in another order
        torch.testing.assert_close(results[1], results[0], rtol=2**-7, atol=2**-6)
        assert [message.split(": ")[1].split(",")[0] for message in messages] == ["torch.autocast is on"]
        assert compiled(X).dtype == torch.float32


@torch.no_grad()
def test_strict_refuses_autocast() -> None:
    compiled = torch.compile(net(), backend=qpass.backend(int8_dynamic(compute_dtype=None), strict=True))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(BackendCompilerFailed, match=r"torch\.autocast is on"):
        compiled(X)
