from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from qpass import observer
from qpass.errors import ConfigError
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec
from qpass.spec.fake_quantize import FakeQuantize


@pytest.mark.parametrize(
    ("keywords", "expected"),
    [
        ({"dtype": torch.int8, "symmetric": True}, (-127, 127)),
        ({"dtype": torch.int8, "symmetric": False}, (-128, 127)),
        ({"dtype": torch.uint8, "symmetric": False}, (0, 255)),
        ({"dtype": torch.uint8, "symmetric": True}, (0, 255)),
        ({"dtype": torch.int16, "symmetric": True}, (-32767, 32767)),
        ({"dtype": torch.int32, "symmetric": False}, (-(2**31), 2**31 - 1)),
        ({"dtype": torch.int8, "quant_min": -8, "quant_max": 7}, (-8, 7)),
        ({"dtype": torch.uint8, "symmetric": False, "quant_max": 15}, (0, 15)),
    ],
)
def test_range(keywords: dict[str, Any], expected: tuple[int, int]) -> None:
    assert QuantizationSpec(**keywords).range == expected


def test_specs_are_values() -> None:
    assert QuantizationSpec() == QuantizationSpec(quant_min=-127, quant_max=127)
    assert len({QuantizationSpec(), QuantizationSpec(quant_min=-127), QuantizationSpec(torch.uint8)}) == 2
    with_args = observer.MovingAverageMinMaxObserver.with_args
    assert QuantizationSpec(observer=with_args(averaging_constant=0.5)) == QuantizationSpec(
        observer=with_args(averaging_constant=0.5)
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(QuantizationSpec, quant_min=7, quant_max=-8),
            "QuantizationSpec quant_min (7) must be below quant_max (-8)\n"
            "  to do: swap them, or leave both out to use the dtype's range",
        ),
        (
            partial(QuantizationSpec, quant_min=-200, quant_max=200),
            "QuantizationSpec range -200..200 does not fit torch.int8, which holds -128..127\n"
            "  to do: narrow the range, or choose a wider dtype",
        ),
        (
            partial(QuantizationSpec, quant_min=-128, quant_max=100),
            "QuantizationSpec is symmetric, but its range -128..100 is not centred on zero\n"
            "  to do: use -100..100, or symmetric=False",
        ),
        (
            partial(QuantizationSpec, torch.int64),
            "QuantizationSpec cannot store codes as torch.int64 (did you mean 'int16'?)\n"
            "  to do: use one of int8, uint8, int16, uint16, int32; "
            "a range below 8 bits is carried in int8 by quant_min and quant_max",
        ),
        (
            partial(QuantizationSpec, torch.float8_e5m2),
            "QuantizationSpec cannot store codes as torch.float8_e5m2: the q/dq operators that graphs carry round to "
            "whole numbers before they cast, so that 0.3 becomes 0\n"
            "  to do: use int8; as a cast, outside a prepared model, an 8-bit float is quantized by the operators of "
            "qpass.ops.quantized_decomposed",
        ),
        (
            partial(QuantizationSpec, granularity="per_channel"),
            "QuantizationSpec granularity cannot be 'per_channel'\n"
            "  to do: use PerTensor(), PerChannel(axis), PerGroup(group_size) or PerToken()",
        ),
        (
            partial(QuantizationSpec, granularity=PerToken()),
            "QuantizationSpec is per token but static: tokens seen in calibration say nothing about later ones\n"
            "  to do: set dynamic=True, or use PerTensor()",
        ),
        (
            partial(QuantizationSpec, torch.uint8, PerToken(), False, True),
            "QuantizationSpec is per token with range 0..255 of torch.uint8: "
            "the per-token operators know int8 in full only\n"
            "  to do: use dtype=torch.int8 without quant_min and quant_max, or PerTensor()",
        ),
        (
            partial(QuantizationSpec, granularity=PerChannel(0), dynamic=True),
            "QuantizationSpec is dynamic with PerChannel(axis=0): "
            "a scale found at run time is per tensor or per token\n"
            "  to do: use PerTensor() or PerToken(), or dynamic=False",
        ),
        (partial(QuantizationSpec, eps=0.0), "QuantizationSpec eps must be positive and finite, not 0.0"),
        (partial(QuantizationSpec, quant_min=0.5), "QuantizationSpec quant_min must be an int or None, not 0.5"),
        (
            partial(QuantizationSpec, observer="histogram"),
            "QuantizationSpec observer must be an observer class or a callable that makes one, not 'histogram'",
        ),
        (
            partial(PerGroup, 0),
            "PerGroup group_size must be a positive int, not 0\n"
            "  to do: choose a size that divides the last dimension of the weight, such as 32, 64 or 128",
        ),
        (partial(PerChannel, "0"), "PerChannel axis must be an int, not '0'"),
    ],
)
def test_nonsense_is_refused(make: partial[object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (QuantizationSpec(torch.uint8, symmetric=False), observer.HistogramObserver),
        (QuantizationSpec(granularity=PerChannel(1)), observer.PerChannelMinMaxObserver),
        (QuantizationSpec(granularity=PerGroup(32)), observer.PerGroupMinMaxObserver),
        (QuantizationSpec(granularity=PerToken(), dynamic=True), observer.PlaceholderObserver),
        (QuantizationSpec(torch.uint8, PerTensor(), False, dynamic=True), observer.PlaceholderObserver),
        (QuantizationSpec(observer=observer.MinMaxObserver, eps=1e-3), observer.MinMaxObserver),
    ],
)
def test_make_observer(spec: QuantizationSpec, expected: type) -> None:
    made = spec.make_observer()
    assert type(made) is expected
    assert made.spec is spec
    assert (made.quant_min, made.quant_max) == spec.range
    assert spec.make_observer() is not made


def test_make_observer_passes_the_axis_and_the_group_size() -> None:
    w = torch.randn(4, 6, 8)
    channels = QuantizationSpec(granularity=PerChannel(-2)).make_observer()
    groups = QuantizationSpec(granularity=PerGroup(4)).make_observer()
    assert channels(w) is w
    assert groups(w) is w
    assert channels.calculate_qparams()[0].shape == (6,)
    assert groups.calculate_qparams()[0].shape == (4, 6, 2)


def test_a_callable_says_whether_what_it_makes_trains() -> None:
    spec = QuantizationSpec(observer=lambda **keywords: FakeQuantize(**keywords))
    with pytest.raises(ConfigError) as error:
        observer.observer_for(spec)
    assert str(error.value) == (
        "QuantizationSpec observer made a qpass.spec.fake_quantize.observed.FakeQuantize, and does not say that it "
        "rounds in training\n"
        "  to do: use the class, its with_args(...) or a functools.partial of it, or give the callable an attribute "
        "trains = True"
    )


def test_make_observer_refuses_strangers() -> None:
    with pytest.raises(ConfigError) as error:
        QuantizationSpec(observer=lambda **keywords: torch.nn.Identity()).make_observer()
    assert str(error.value) == (
        "QuantizationSpec observer made a torch.nn.modules.linear.Identity, which is not a qpass observer\n"
        "  to do: use a class of qpass.observer, or derive one from qpass.observer.ObserverBase"
    )
