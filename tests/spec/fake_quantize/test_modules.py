from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.ao.quantization as torchs
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import qpass.fake_quantize as modules
from qpass.errors import CalibrationError, ConfigError
from qpass.fake_quantize import (
    FakeQuantize,
    FakeQuantizeBase,
    FixedQParamsFakeQuantize,
    FusedMovingAvgObsFakeQuantize,
    disable_fake_quant,
    disable_observer,
    enable_fake_quant,
    enable_observer,
    freeze_batch_norm_stats,
    freeze_observers,
    update_batch_norm_stats,
    update_observers,
)
from qpass.observer import HistogramObserver, MinMaxObserver, ObserverBase, PercentileObserver

PRESETS = [name for name in modules.__all__ if name.startswith(("default_", "fused_"))]


@pytest.mark.filterwarnings("ignore")  # torch's modules warn that they will move
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_torchs(name: str) -> None:
    own, theirs = getattr(modules, name)(), getattr(torchs, name)()
    assert type(own).__name__ == type(theirs).__name__
    assert type(own.activation_post_process).__name__ == type(theirs.activation_post_process).__name__
    for attribute in ("quant_min", "quant_max", "ch_axis", "is_per_channel", "is_dynamic"):
        assert getattr(own, attribute) == getattr(theirs, attribute), attribute
    inside, theirs_inside = own.activation_post_process, theirs.activation_post_process
    assert inside.qscheme == theirs_inside.qscheme
    assert getattr(inside, "averaging_constant", 0) == getattr(theirs_inside, "averaging_constant", 0)
    assert getattr(modules, name) == copy.deepcopy(getattr(modules, name))
    if isinstance(inside, HistogramObserver) or (name.startswith(("default_fused", "fused")) and "wt" in name):
        return  # another range of least error; and torch's fused kernel has a formula of its own for symmetric scales
    for x in (torch.rand(4, 64), torch.rand(4, 64) * 2 - 1):
        torch.testing.assert_close(own(x), theirs(x), rtol=1e-6, atol=1e-6)  # torch multiplies in another order
        if not own.is_dynamic:
            assert torch.equal(own.scale, theirs.scale)
            assert torch.equal(own.zero_point, theirs.zero_point)


def test_every_name_of_torchs_is_there() -> None:
    import qpass.observer as observers

    assert set(torch.ao.quantization.fake_quantize.__all__) <= set(modules.__all__)
    names = {name for name in torch.ao.quantization.observer.__all__ if "bserver" in name and "state_dict" not in name}
    beside = {"UniformQuantizationObserverBase", "AffineQuantizedObserverBase"}  # inner bases
    assert names - beside <= set(observers.__all__)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", ["default_fake_quant", "default_per_channel_weight_fake_quant", "default_fused_act_fake_quant"]
)
def test_a_checkpoint_of_torchs_is_loaded(name: str) -> None:
    theirs, own = (nn.Sequential(getattr(lib, name)()) for lib in (torchs, modules))
    x = torch.randn(4, 8)
    theirs(x)
    theirs[0].observer_enabled[0] = 0
    saved = io.BytesIO()
    torch.save(theirs.state_dict(), saved)
    saved.seek(0)
    own.load_state_dict(torch.load(saved))
    assert own[0].observer_enabled == 0
    assert own[0].has_data
    assert torch.equal(own[0].scale, theirs[0].scale)
    assert torch.equal(own[0].activation_post_process.max_val, theirs[0].activation_post_process.max_val)
    assert {key.rpartition(".")[2] for key in theirs.state_dict()} - {"eps"} <= {
        key.rpartition(".")[2] for key in own.state_dict()
    }
    torch.testing.assert_close(own(x), theirs(x), rtol=1e-6, atol=1e-6)


def test_a_refused_checkpoint_changes_nothing_of_the_module() -> None:
    own = FakeQuantize(MinMaxObserver)
    own(torch.randn(8))
    before = copy.deepcopy(own.state_dict())
    saved = before | {"zero_point": torch.tensor([-1], dtype=torch.int32), "scale": torch.tensor([0.5])}
    with pytest.raises(RuntimeError, match=r"zero_point holds -1, which is not within 0\.\.255"):
        own.load_state_dict(saved)
    assert torch.equal(own.scale, before["scale"])
    with pytest.raises(RuntimeError, match=r"activation_post_process\.min_val is NaN"):
        own.load_state_dict(before | {"activation_post_process.min_val": torch.tensor(torch.nan)})


def test_fixed_qparams_stay() -> None:
    module = modules.default_fixed_qparams_range_0to1_fake_quant().eval()
    for x in (torch.rand(100), torch.randn(100) * 9):
        assert torch.equal(module(x), ((x * 256).round().clamp(0, 255)) / 256)
        module.train()
    assert module.has_data
    module.to_empty(device="cpu").reset_parameters()
    assert (module.scale, module.zero_point) == (1 / 256, 0)
    with pytest.raises(ConfigError, match="needs a FixedQParamsObserver, not a MinMaxObserver"):
        FixedQParamsFakeQuantize(MinMaxObserver)
    with pytest.raises(ConfigError, match="needs an observer of a moving average"):
        FusedMovingAvgObsFakeQuantize(MinMaxObserver)
    with pytest.raises(ConfigError, match=r"made a torch\.nn\.modules\.linear\.Identity"):
        FakeQuantize(lambda: nn.Identity())
    with pytest.raises(CalibrationError, match=r"cannot observe a tensor of torch\.int64"):
        FakeQuantize()(torch.ones(3, dtype=torch.int64))


def test_switches_and_schedules() -> None:
    class Folded(nn.Module):
        frozen = False

        def forward(self, x: Tensor) -> Tensor:
            return x

        def freeze_batch_norm_stats(self) -> None:
            self.frozen = True

        def update_batch_norm_stats(self) -> None:
            self.frozen = False

    model = nn.Sequential(nn.BatchNorm1d(8), FakeQuantize(), Folded(), nn.Sequential(FakeQuantize()))
    quantizers = [part for part in model.modules() if isinstance(part, FakeQuantizeBase)]
    assert all(isinstance(part, ObserverBase) for part in quantizers)
    for switch, name, value in (
        (disable_fake_quant, "fake_quant_enabled", 0), (enable_fake_quant, "fake_quant_enabled", 1),
        (disable_observer, "observer_enabled", 0), (enable_observer, "observer_enabled", 1),
    ):  # fmt: skip
        model.apply(switch)
        assert [getattr(part, name).item() for part in quantizers] == [value, value]
    freeze_observers(model)
    freeze_batch_norm_stats(model)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(4, 8) * 5 + 3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (model[0].training, model[1].training, model[2].frozen) == (False, True, True)
    update_observers(model)
    update_batch_norm_stats(model)
    model(torch.randn(4, 8) * 5 + 3)
    assert all(
        not torch.equal(before[key], model.state_dict()[key]) for key in ("0.running_mean", "1.scale", "3.0.scale")
    )
    assert not model[2].frozen


def test_recomputing_a_checkpoint_observes_once() -> None:
    plain, recomputed = FakeQuantize(averaging_constant=0.5), FakeQuantize(averaging_constant=0.5)
    for step in range(3):
        x = torch.randn(16) * 3**step
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        (plain(mine) ** 2).sum().backward()
        checkpoint(lambda t: (recomputed(t) ** 2).sum(), theirs, use_reentrant=False).backward()
        assert torch.equal(mine.grad, theirs.grad)
    assert torch.equal(plain.scale, recomputed.scale)
    assert recomputed.activation_post_process.batches == 3


def test_inductor_computes_what_eager_computes() -> None:
    """One graph for a tensor and channels; rounding on ties and beyond the range included."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tensor = FakeQuantize(MinMaxObserver)
            self.channels = modules.default_per_channel_weight_fake_quant()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.tensor(x), self.channels(x)

    eager = Net()
    eager(torch.linspace(-1, 1, 64).reshape(8, 8))
    eager.tensor.disable_observer()
    compiled = copy.deepcopy(eager)
    call = torch.compile(compiled, fullgraph=True)
    for step in range(3):
        if step == 1:
            for net in (eager, compiled):
                net.tensor.disable_fake_quant()
                net.tensor.enable_observer()
        x = torch.randn(8, 1024) if step else torch.arange(-4096, 4096).reshape(8, 1024) / 2040
        results = []
        for net, function in ((eager, eager), (compiled, call)):
            leaf = x.clone().requires_grad_()
            outputs = function(leaf)
            sum(output.sum() * (index + 1) for index, output in enumerate(outputs)).backward()  # type: ignore[union-attr]
            results.append([*outputs, leaf.grad, *net.state_dict().values()])
        assert [i for i, (a, b) in enumerate(zip(*results, strict=True)) if not torch.equal(a, b)] == []


def test_other_observers_inside() -> None:
    x = torch.randn(4000)
    x[0] = 8.0
    for make in (HistogramObserver, PercentileObserver.with_args(percentile=99.5)):
        module = FakeQuantize(make, dtype=torch.int4, qscheme=torch.per_tensor_symmetric)
        module(x)
        assert module.scale < 7 / 7.5  # the outlier alone would make it 8 / 7.5
        exported = torch.export.export(copy.deepcopy(module), (x,)).module()
        assert torch.equal(exported(x), module(x))


def test_function_transforms_map_it_in_training_too_but_cannot_observe() -> None:
    x = torch.randn(3, 4, 8)
    for module in (FakeQuantize(), modules.default_per_channel_weight_fake_quant(), FakeQuantize(HistogramObserver)):
        module(x[0])
        gradient = torch.func.grad(lambda row, module=module: module(row).sum())
        for transform, given in ((torch.func.vmap(module), x), (gradient, x[0]), (torch.func.vmap(gradient), x)):
            with pytest.raises(CalibrationError, match=r"cannot observe inside torch\.func\.vmap or grad"):
                transform(given)
        freeze_observers(module)
        assert torch.equal(torch.func.vmap(module)(x), torch.stack([module(row) for row in x]))
        leaf = x.clone().requires_grad_()
        torch.stack([module(row) for row in leaf]).sum().backward()
        assert torch.equal(torch.func.vmap(gradient)(x), leaf.grad)
