"""What every step leaves behind it: each is a fault that the nearest relative of this library has."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from interpret import operators
from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, WEIGHT_ONLY, Do, kernel_names, run_stages, same
from qpass.spec.config import Config

CONFIGS = {"static": STATIC, "tensor": PER_TENSOR, "token": PER_TOKEN, "weight only": WEIGHT_ONLY}


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_convert_leaves_the_prepared_model_usable(name: str) -> None:
    net, x = model(), torch.randn(4, 16)
    prepared = qpass.prepare(net, (x,), config=CONFIGS[name])
    prepared(x)
    before, text = prepared(x), operators(prepared)
    first = qpass.convert(prepared)
    assert operators(prepared) == text
    assert same(prepared(x), before)
    second = qpass.convert(prepared)
    assert operators(first) == operators(second)
    assert same(first(x), second(x))
    prepared(10 * x)  # calibrated further, it converts to a wider range
    wider = qpass.convert(prepared)
    assert same(first(x), second(x))
    assert same(wider(x), first(x)) == (name != "static")


def test_lower_leaves_the_quantized_model_usable() -> None:
    r = run_stages(model(), x := torch.randn(4, 16))
    before, text = r.quantized(x), operators(r.quantized)
    first, second = qpass.lower(r.quantized), qpass.lower(r.quantized)
    assert operators(r.quantized) == text
    assert same(r.quantized(x), before)
    assert same(first(x), second(x))


def test_no_step_edits_the_model_or_copies_its_weights() -> None:
    net, x = model(), torch.randn(4, 16)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    prepared = qpass.prepare(net, (x,), config=STATIC)
    assert {tensor.data_ptr() for tensor in net.parameters()} <= {tensor.data_ptr() for tensor in prepared.parameters()}
    prepared(x)
    lowered = qpass.lower(qpass.convert(prepared))
    lowered(x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert [type(module) for module in net] == [nn.Linear, nn.ReLU, nn.Linear]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_batch_size_of_calibration_is_not_baked_in(name: str) -> None:
    prepared = qpass.prepare(model(), (torch.randn(4, 16),), config=CONFIGS[name])
    qpass.calibrate(prepared, [torch.randn(4, 16), torch.randn(8, 16), torch.randn(3, 16), torch.randn(1, 16)])
    quantized = qpass.convert(prepared)
    lowered = qpass.lower(quantized)
    for batch in (1, 2, 5, 64):
        x = torch.randn(batch, 16)
        assert quantized(x).shape == (batch, 4)
        # A code between the layers that falls differently at a tie moves a result by one step of about 1/255 of it.
        assert (lowered(x) - quantized(x)).abs().max() < 0.02 * quantized(x).abs().max()


@pytest.mark.parametrize("decorated", [True, False])
def test_what_runs_without_gradients_is_quantized(decorated: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            return m.b(torch.relu(m.a(x)))

    function = torch.no_grad()(lambda m, x: m.b(torch.relu(m.a(x)))) if decorated else forward
    r = run_stages(Do(function, a=nn.Linear(16, 8), b=nn.Linear(8, 4)), torch.randn(4, 16))
    assert kernel_names(r.lowered) == ["onednn.qlinear with relu, quantize", "onednn.qlinear"]


def test_a_symmetric_dynamic_range_feeds_two_linears() -> None:
    spec = qpass.QuantizationSpec(torch.int8, symmetric=True, dynamic=True)
    config = Config(activation=spec, weight=STATIC.weight)
    model = Do(lambda m, x: m.a(x) * torch.relu(m.b(x)), a=nn.Linear(16, 8), b=nn.Linear(16, 8))
    r = run_stages(model, torch.randn(4, 16), config=config)
    assert kernel_names(r.lowered) == ["onednn.qlinear", "onednn.qlinear with relu"]
    assert operators(r.lowered).count("= quantize_per_tensor.tensor(") == 1


def test_nothing_keeps_a_model_alive() -> None:
    net, x = model(), torch.randn(4, 16)
    prepared = qpass.prepare(net, (x,), config=STATIC)
    prepared(x)
    quantized = qpass.convert(prepared)
    lowered = qpass.lower(quantized)
    lowered(x)
    alive = [weakref.ref(thing) for thing in (net, prepared, quantized, lowered, lowered.graph)]
    del net, prepared, quantized, lowered
    gc.collect()
    assert [ref() for ref in alive] == [None] * 5
