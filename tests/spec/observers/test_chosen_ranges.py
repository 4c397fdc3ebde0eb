"""Observers that choose a part of the range, or none at all."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.ao.quantization as torchs

import qpass.observer as observers
from qpass.arithmetic import numerics
from qpass.errors import CalibrationError, ConfigError
from qpass.observer import (
    FixedQParamsObserver,
    NoopObserver,
    PercentileObserver,
    PerChannelMinMaxObserver,
    PerChannelMSEObserver,
    PlaceholderObserver,
    RecordingObserver,
    ReuseInputObserver,
)

SYMMETRIC = {"dtype": torch.int8, "qscheme": torch.per_tensor_symmetric}


@pytest.mark.parametrize("percentile", [90.0, 99.0, 99.9])
def test_the_percentile_of_the_values_lies_inside(percentile: float) -> None:
    x = torch.randn(100_000) + 1.0
    width = float(x.max() - x.min()) / 1024  # a bin is at most that wide
    affine, symmetric = PercentileObserver(percentile), PercentileObserver(percentile, **SYMMETRIC)
    for observer in (affine, symmetric):
        for batch in x.split(30_000):
            observer(batch)
    cut = (1 - percentile / 100) / 2
    low, high = affine.chosen_range()
    assert abs(low - x.quantile(cut)) <= width
    assert abs(high - x.quantile(1 - cut)) <= width
    assert abs(symmetric.chosen_range()[1] - x.abs().quantile(percentile / 100)) <= width
    assert torch.equal(symmetric.calculate_qparams()[0], symmetric.chosen_range()[1].reshape(1) / 127.5)


def test_100_percent_is_the_full_range() -> None:
    x = torch.randn(1000)
    for keywords in ({}, SYMMETRIC):
        observer = PercentileObserver(100, **keywords)
        observer(x)
        low, high = observer.chosen_range()
        assert (low == x.min()) if not keywords else (high == x.max() or low == x.min())
    for wrong in (50, 100.1):
        with pytest.raises(ConfigError, match="must lie above 50"):
            PercentileObserver(wrong)


@pytest.mark.parametrize("axis", [0, -1])
def test_the_range_of_least_error_for_each_channel(axis: int) -> None:
    w = torch.distributions.StudentT(3.0).sample((6, 500)) * torch.logspace(-2, 2, 6)[:, None]
    w = w if axis == 0 else w.T.contiguous()
    keywords = {"ch_axis": axis, "dtype": torch.int4, "qscheme": torch.per_channel_symmetric}
    chosen, full = PerChannelMSEObserver(**keywords), PerChannelMinMaxObserver(**keywords)

    def errors(scale: torch.Tensor) -> torch.Tensor:
        rows = w.movedim(axis, 0)
        codes = numerics.quantize(rows, scale[:, None], 0, -8, 7, torch.int8)
        return (numerics.dequantize(codes, scale[:, None], 0) - rows).double().square().sum(1)

    for observer in (chosen, full):
        observer(w)
    found, widest = (observer.calculate_qparams()[0] for observer in (chosen, full))
    best = torch.stack([errors(widest * part) for part in torch.linspace(0.02, 1, 150)]).amin(0)
    assert (errors(found) <= best * 1.02).all()  # steps of 1.1 % in the scale: the error is flat around its least
    assert (errors(found) < errors(widest)).all()


def test_mse_leaves_out_what_is_not_finite() -> None:
    w = torch.randn(3, 50)
    dirty = torch.cat([w, torch.tensor([[torch.nan], [torch.inf], [0.0]])], 1)
    clean, observer = PerChannelMSEObserver(), PerChannelMSEObserver()
    clean(w)
    observer(dirty)
    assert observer.nonfinite == 2
    assert torch.equal(observer.calculate_qparams()[0], clean.calculate_qparams()[0])


def test_observers_that_choose_nothing() -> None:
    x = torch.randn(3, requires_grad=True)
    for observer, dtype in (
        (NoopObserver(), torch.float16), (ReuseInputObserver(), torch.uint8), (RecordingObserver(), torch.uint8),
        (PlaceholderObserver(torch.float16), torch.float16), (PlaceholderObserver(), torch.float32),
    ):  # fmt: skip
        assert observer(x) is x
        assert observer.dtype == dtype
        with pytest.raises(CalibrationError, match="has no qparams"):
            observer.calculate_qparams()
    assert PlaceholderObserver(compute_dtype=torch.quint8).is_dynamic
    assert NoopObserver(custom_op_name="mine").custom_op == "mine"


def test_recording_keeps_what_was_seen() -> None:
    observer = RecordingObserver()
    x = torch.randn(3)
    expected = [x.clone(), x + 1]
    observer(x)
    observer(x.add_(1))
    assert all(torch.equal(*pair) for pair in zip(observer.get_tensor_value(), expected, strict=True))


def test_fixed_qparams_are_checked() -> None:
    observer = FixedQParamsObserver(0.5, 3)
    assert observer.has_data
    assert observer.calculate_qparams() == (torch.tensor([0.5]), torch.tensor([3]))
    for arguments, reason in (((0.0, 0), "scale must be positive"), ((1.0, 256), "zero_point 256 is not within")):
        with pytest.raises(ConfigError, match=reason):
            FixedQParamsObserver(*arguments)
    with pytest.raises(ConfigError, match="cannot be dynamic"):
        FixedQParamsObserver(1.0, 0, is_dynamic=True)


@pytest.mark.parametrize(
    "name", [name for name in observers.__all__ if name.startswith(("default_", "weight_", "per_"))]
)
def test_every_preset_is_torchs(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's modules warn that they will move
        own, theirs = getattr(observers, name)(), getattr(torchs.observer, name)()
    assert type(own).__name__ == type(theirs).__name__
    assert own.is_dynamic == theirs.is_dynamic
    for attribute in ("quant_min", "quant_max", "qscheme", "ch_axis"):
        if getattr(theirs, attribute, None) is not None and hasattr(own, "min_val"):
            assert getattr(own, attribute) == getattr(theirs, attribute)
    x = torch.randn(4, 64)
    assert own(x) is x
    theirs(x)
    if hasattr(own, "min_val") and not hasattr(own, "histogram"):  # a histogram chooses otherwise
        for found, expected in zip(own.calculate_qparams(), theirs.calculate_qparams(), strict=True):
            assert torch.equal(found, expected.to(found.dtype))


def test_contradictions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot have the qscheme torch\.per_channel_affine"):
        observers.MinMaxObserver(qscheme=torch.per_channel_affine)
    with pytest.raises(ConfigError, match=r"cannot store codes as torch\.float8_e4m3fn"):
        observers.MinMaxObserver(dtype=torch.float8_e4m3fn)
    assert observers.MinMaxObserver(dtype=torch.uint4).spec.range == (0, 15)
    assert observers.MinMaxObserver(dtype=torch.qint8, reduce_range=True).spec.range == (-64, 63)
