from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qpass.errors import CalibrationError, ConfigError
from qpass.observer import (
    HistogramObserver,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PerChannelMinMaxObserver,
    PerGroupMinMaxObserver,
    PlaceholderObserver,
)

OBSERVERS = [
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    PerGroupMinMaxObserver.with_args(group_size=4),
    HistogramObserver,
    PlaceholderObserver,
]
RANGED = OBSERVERS[:-1]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("make", OBSERVERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_very_tensor_comes_back_untouched(make: Any, dtype: torch.dtype) -> None:
    x = torch.randn(3, 8, dtype=dtype, requires_grad=True)
    before = x.detach().clone()
    for guard in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        observer = make()
        with guard():
            assert observer(x) is x
            assert observer(x) is x
        assert torch.equal(x.detach(), before)
        assert observer.has_data
        assert observer.batches == 2
        observer(x)  # what inference mode wrote can be written again outside
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in observer.buffers())


@pytest.mark.parametrize("make", OBSERVERS)
def test_empty_batches_are_passed_over(make: Any) -> None:
    observer = make()
    observer(torch.empty(0, 8))
    assert not observer.has_data
    observer(torch.randn(3, 8))
    state = copy.deepcopy(observer)
    observer(torch.empty(0, 8))
    assert same_state(observer, state)


@pytest.mark.parametrize("make", RANGED)
def test_nan_and_infinity_leave_no_trace_but_their_count(make: Any) -> None:
    clean = torch.randn(3, 8)
    dirty = torch.full((3, 8), torch.nan)
    dirty[0, :2] = torch.tensor([torch.inf, -torch.inf])
    observer, expected = make(), make()
    observer(dirty)
    assert not observer.has_data  # nothing finite was seen
    observer(clean)
    expected(clean)
    assert observer.nonfinite == 24
    for found, wanted in zip(observer.calculate_qparams(), expected.calculate_qparams(), strict=True):
        assert torch.equal(found, wanted)


def test_finite_neighbours_of_nan_are_seen() -> None:
    x = torch.tensor([[1.0, torch.nan, -2.0], [torch.inf, 3.0, 0.5]])
    tensor, channel, histogram = MinMaxObserver(), PerChannelMinMaxObserver(), HistogramObserver()
    for observer in (tensor, channel, histogram):
        observer(x)
        assert observer.nonfinite == 2
        assert observer.batches == 1
    assert (tensor.min_val, tensor.max_val) == (-2.0, 3.0)
    assert channel.min_val.tolist() == [-2.0, 0.5]
    assert channel.max_val.tolist() == [1.0, 3.0]
    assert histogram.histogram.sum() == 4


def test_float64_beyond_float32_counts_as_not_finite() -> None:
    observer = MinMaxObserver()
    observer(torch.tensor([1e300, 1.0], dtype=torch.float64))
    assert (observer.max_val, observer.nonfinite) == (1.0, 1)


@pytest.mark.parametrize("make", OBSERVERS)
def test_integers_are_refused(make: Any) -> None:
    observer = make()
    with pytest.raises(CalibrationError) as error:
        observer(torch.ones(3, 8, dtype=torch.int64))
    assert str(error.value) == (
        f"{type(observer).__name__} cannot observe a tensor of torch.int64: only floating values are quantized\n"
        "  to do: leave this operator in float: config.keep_float(...)"
    )


@pytest.mark.parametrize("make", RANGED)
def test_without_data_qparams_are_one_and_a_warning(make: Any) -> None:
    observer = make()
    with pytest.warns(UserWarning, match="has seen no data: its scale is 1"):
        scale, _ = observer.calculate_qparams()
    assert (scale == 1).all()
    observer(torch.randn(3, 8))
    observer.reset()
    with pytest.warns(UserWarning, match="has seen no data"):
        scale, _ = observer.calculate_qparams()
    assert (scale == 1).all()


def test_placeholder_has_no_qparams() -> None:
    with pytest.raises(CalibrationError, match="chosen from each tensor at run time"):
        PlaceholderObserver().calculate_qparams()


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_per_channel(axis: int) -> None:
    batches = [torch.randn(4, 5, 6) for _ in range(3)]
    observer = PerChannelMinMaxObserver(ch_axis=axis, dtype=torch.int8, qscheme=torch.per_channel_symmetric)
    for x in batches:
        observer(x)
    largest = torch.stack(batches).movedim(axis % 3 + 1, 0).flatten(1).abs().amax(1)
    scale, zero_point = observer.calculate_qparams()
    assert torch.equal(scale, largest / 127.5)
    assert torch.equal(zero_point, torch.zeros(len(largest), dtype=torch.int32))


def test_per_group() -> None:
    w = torch.randn(3, 8)
    observer = PerGroupMinMaxObserver(group_size=4, quant_min=-127, quant_max=127)
    observer(w)
    assert torch.equal(observer.calculate_qparams()[0], w.reshape(3, 2, 4).abs().amax(-1) / 127)
    with pytest.raises(ConfigError) as error:
        PerGroupMinMaxObserver(group_size=3)(w)
    assert str(error.value) == (
        "group_size 3 does not divide the last dimension of shape (3, 8)\n"
        "  to do: choose a group size that divides it, or PerChannel"
    )


def test_one_observer_watches_one_tensor() -> None:
    observer = PerChannelMinMaxObserver()
    observer(torch.randn(4, 2))
    with pytest.raises(CalibrationError, match=r"has ranges of shape \(4,\), but this tensor has \(5,\) of them"):
        observer(torch.randn(5, 2))
    with pytest.raises(ConfigError, match="has ch_axis 2, but the tensor has 2 dimensions"):
        PerChannelMinMaxObserver(ch_axis=2)(torch.randn(4, 2))


def test_moving_average() -> None:
    observer = MovingAverageMinMaxObserver(averaging_constant=0.25)
    for low, high in ((-1.0, 2.0), (-5.0, 6.0), (-3.0, -2.0)):
        observer(torch.tensor([low, high]))
    assert (observer.min_val, observer.max_val) == (-2.25, 1.75)  # -1 -> -2 -> -2.25 and 2 -> 3 -> 1.75


@pytest.mark.parametrize("make", RANGED)
def test_state_is_saved_and_not_cast(make: Any) -> None:
    observer, loaded = make(), make()
    observer(torch.randn(3, 8))
    loaded.load_state_dict(observer.state_dict())
    assert same_state(observer, loaded)
    assert same_state(observer, copy.deepcopy(observer).bfloat16().to(torch.float64))
    loaded(torch.randn(3, 8))
    assert loaded.batches == 2


def test_constructors_take_torchs_keywords() -> None:
    observer = MinMaxObserver(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, quant_min=-8, quant_max=7, eps=0.5)
    assert (observer.dtype, observer.quant_min, observer.quant_max, observer.eps) == (torch.int8, -8, 7, 0.5)
    assert (MinMaxObserver().quant_min, MinMaxObserver().quant_max) == (0, 255)
    assert MinMaxObserver(dtype=torch.int8, qscheme=torch.per_tensor_symmetric).quant_min == -128
    make = MovingAverageMinMaxObserver.with_args(averaging_constant=0.5).with_args(dtype=torch.int8)
    made = make(eps=1.0)
    assert (made.averaging_constant, made.dtype, made.eps) == (0.5, torch.int8, 1.0)
    assert make == MovingAverageMinMaxObserver.with_args(dtype=torch.int8, averaging_constant=0.5)
    assert hash(make) == hash(copy.copy(make))


@pytest.mark.parametrize("make", OBSERVERS)
def test_tensors_without_data_are_not_watched(make: Any) -> None:
    observer = make()
    meta = torch.empty(3, 8, device="meta")
    assert observer(meta) is meta
    with FakeTensorMode(allow_non_fake_inputs=True):
        observer(torch.empty(3, 8))
    assert not observer.has_data


@pytest.mark.parametrize("make", OBSERVERS)
def test_a_retraced_observer_sees_what_an_eager_one_sees(make: Any) -> None:
    """``torch.export`` cannot branch on values: the traced observer takes another way to the same statistics."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.activation_post_process_0 = make()

        def forward(self, x: Tensor) -> Tensor:
            return self.activation_post_process_0(x * 2) + 1

    eager = Model()
    eager(torch.randn(3, 8) * 0.1)  # ranges per channel have their shape before a trace
    traced = torch.export.export(copy.deepcopy(eager), (torch.randn(3, 8),)).module()
    for factor in (0.05, 7.0, torch.nan, 300.0):
        x = torch.randn(3, 8)
        x[0, 0] *= factor
        assert torch.equal(traced(x), eager(x)) or factor != factor
    assert same_state(traced.activation_post_process_0, eager.activation_post_process_0)


def test_minimum_and_maximum_need_no_copy_of_a_weight() -> None:
    w = torch.randn(1024, 1024, dtype=torch.bfloat16)
    for observer in (MinMaxObserver(), PerChannelMinMaxObserver(), PerChannelMinMaxObserver(ch_axis=1)):
        assert peak_bytes(observer, w) < w.numel() // 8  # an eighth of a byte per value: far below any copy


def peak_bytes(observer: ObserverBase, x: Tensor) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        observer(x)
    live = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak
