"""Calibration data gone wrong: absurd values, one value alone; noted with their place, and kept out of histograms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpass
from pipeline_run import Do
from qpass.observer import HistogramObserver, MinMaxObserver, PercentileObserver
from qpass.presets import int8_static
from qpass.spec import QuantizationSpec

SMALLEST = torch.finfo(torch.float32).min


def data(seed: int = 0) -> Tensor:
    return torch.randn(64, 16, generator=torch.Generator().manual_seed(seed))


def spoiled(value: float) -> Tensor:
    x = data(1)
    x[3, 5] = value
    return x


@pytest.mark.parametrize("value", [1e30, -1e9, -65504.0, SMALLEST, 2.0**31])
@pytest.mark.parametrize("kind", [HistogramObserver, PercentileObserver])
@pytest.mark.parametrize("first", [True, False])
def test_one_absurd_value_changes_no_count_and_no_range(
    value: float, kind: type[HistogramObserver], first: bool
) -> None:
    observer, clean = kind(), kind()
    batches = [spoiled(value), data(2)] if first else [data(2), spoiled(value)]
    for x in batches:
        assert observer(x) is x
        clean(x[x.abs() < 1e3])
    assert torch.equal(observer.histogram, clean.histogram)
    assert observer.calculate_qparams() == clean.calculate_qparams()
    assert observer.nonfinite == 0
    assert observer.outliers.worst == float(torch.tensor(value))


def test_infinities_and_nan_are_counted_beside_an_absurd_value() -> None:
    observer, x = HistogramObserver(), spoiled(1e30)
    x[0, :3] = torch.tensor([torch.inf, -torch.inf, torch.nan])
    observer(x)
    assert observer.nonfinite == 3
    assert observer.max_val < 10


@pytest.mark.parametrize("value", [1e3, -3e3])
def test_a_massive_activation_is_kept(value: float) -> None:
    """Language models have those, and their outputs depend on them."""
    observer = HistogramObserver()
    observer(spoiled(value))
    assert value in (float(observer.min_val), float(observer.max_val))
    assert observer.outliers.note(True) == ""


@pytest.mark.parametrize("x", [torch.zeros(200), torch.full((200,), 3.0), torch.tensor([1e-30, 1e30]), torch.empty(0)])
def test_constant_few_and_no_values_are_never_absurd(x: Tensor) -> None:
    observer = HistogramObserver()
    observer(x)
    assert observer.outliers.worst == 0
    reference = MinMaxObserver()
    reference(x)
    assert (observer.min_val, observer.max_val) == (reference.min_val, reference.max_val)


def test_many_large_values_are_data() -> None:
    """One in ten: a mask, say, which the model quantizes because it was told to."""
    observer, x = HistogramObserver(), data()
    x.view(-1)[::10] = -1e9
    observer(x)
    assert observer.min_val == -1e9


def test_values_that_all_grow_are_no_outliers() -> None:
    observer = HistogramObserver()
    for factor in (1.0, 1e3, 1e9):
        observer(data() * factor)
    assert observer.outliers.worst == 0
    assert observer.max_val > 1e9


def test_reset_forgets_absurd_values() -> None:
    observer = HistogramObserver()
    observer(spoiled(1e30))
    observer.reset()
    assert observer.outliers.note(True) == ""


def notes(model: nn.Module, *batches: Tensor, **activation: object) -> tuple[str, ...]:
    config = int8_static(compute_dtype=None)
    if activation:
        config = qpass.Config(
            activation=QuantizationSpec(torch.uint8, symmetric=False, **activation),  # type: ignore[arg-type]
            weight=config.weight, compute_dtype=None,
        )  # fmt: skip
    prepared = qpass.prepare(model.eval(), batches[:1], config=config)
    qpass.calibrate(prepared, batches, progress=False)
    return qpass.report(qpass.convert(prepared)).notes


def test_the_report_names_layer_and_value_and_the_model_stays_good() -> None:
    model = Do(lambda m, x: m.second(m.first(x).relu()), first=nn.Linear(16, 16), second=nn.Linear(16, 4)).eval()
    found = notes(model, data(), spoiled(1e30))
    text = next(note for note in found if note.startswith("first "))
    assert "calibration saw the value 1e+30, far beyond all others" in text
    assert text.endswith("it is left out of the range")
    assert any(note.startswith("second ") for note in found)  # what the first makes of it
    prepared = qpass.prepare(model, (data(),), config=int8_static(compute_dtype=None))
    qpass.calibrate(prepared, [data(), spoiled(1e30)], progress=False)
    x = data(7)
    # 8 bits of activations and weights give about 40 dB; a range of 1e30 gives 0
    assert qpass.sqnr(model, qpass.convert(prepared), [x]) > 30


def test_a_range_from_min_to_max_is_what_was_asked_for_and_noted() -> None:
    model = Do(lambda m, x: m.first(x), first=nn.Linear(16, 16))
    (text,) = notes(model, data(), spoiled(-1e9), observer=MinMaxObserver)
    assert "the value -1e+09" in text
    assert text.endswith("it sets the range")


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_one_value_alone_is_noted(value: float) -> None:
    model = Do(lambda m, x: m.first(x), first=nn.Linear(16, 16))
    (text,) = notes(model, torch.full((8, 16), value))
    assert text.startswith("first (")
    assert text.endswith(f"calibration saw the one value {value:.3g} alone")


def test_good_data_have_no_note() -> None:
    assert notes(Do(lambda m, x: m.first(x), first=nn.Linear(16, 16)), data()) == ()
