"""Each known defect of torch's fake-quantize modules: the same demand fails on torch's, and holds on qpass's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.ao.quantization as torchs
from torch import Tensor, nn

import qpass.fake_quantize
import qpass.observer
from qpass.errors import QpassError

QPASS = SimpleNamespace(**vars(qpass.observer) | vars(qpass.fake_quantize))
DEMANDS: dict[str, Callable[[Any], None]] = {}


def demand(row: str) -> Callable[[Callable[[Any], None]], None]:
    return lambda check: DEMANDS.update({row: check})


def per_channel(lib: Any, ch_axis: int = 0, **keywords: Any) -> nn.Module:
    scheme = torch.per_channel_symmetric
    return lib.FakeQuantize(
        lib.MovingAveragePerChannelMinMaxObserver,
        -128, 127, dtype=torch.qint8, qscheme=scheme, ch_axis=ch_axis, **keywords,
    )  # fmt: skip


class Layer(nn.Module):
    """A linear whose weight and result are fake-quantized."""

    def __init__(self, lib: Any) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.weight_fake_quant = lib.default_fused_per_channel_wt_fake_quant()
        self.activation_post_process = lib.default_fake_quant()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation_post_process(
            nn.functional.linear(x, self.weight_fake_quant(self.fc.weight), self.fc.bias)
        )


def net(lib: Any, layers: int = 10) -> nn.Module:
    model = nn.Sequential(*(Layer(lib) for _ in range(layers)))
    model(torch.randn(4, 8))
    return model


for bad in ("nan", "inf"):

    @demand(f"the batch after one with {bad} recovers")
    def _(lib: Any, bad: str = bad) -> None:
        for module in (lib.FakeQuantize(), lib.FusedMovingAvgObsFakeQuantize(), per_channel(lib)):
            x = torch.randn(4, 8)
            x[0, 0] = float(bad)
            module(x)
            y = module(torch.randn(4, 8))
            assert module.scale.isfinite().all()
            assert y.isfinite().all()


@demand("values that are not finite are counted")
def _(lib: Any) -> None:
    module = lib.FakeQuantize()
    module(torch.tensor([1.0, torch.nan, torch.inf]))
    assert module.activation_post_process.nonfinite == 2
    assert "nonfinite=2" in repr(module)


for dtype in (torch.float16, torch.bfloat16, torch.float64):

    @demand(f"the fused module takes {dtype}")
    def _(lib: Any, dtype: torch.dtype = dtype) -> None:
        for module in (lib.default_fused_act_fake_quant(), lib.default_fused_per_channel_wt_fake_quant()):
            x = torch.randn(4, 8, dtype=dtype, requires_grad=True)
            y = module(x)
            y.sum().backward()
            assert y.dtype == x.grad.dtype == dtype


@demand("the fused module runs under autocast")
def _(lib: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), lib.default_fused_act_fake_quant())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(4, 8)).dtype == torch.bfloat16


@demand("casting the model leaves qparams float32")
def _(lib: Any) -> None:
    for cast in (nn.Module.bfloat16, nn.Module.half, nn.Module.double):
        module = lib.default_fused_act_fake_quant()
        module(torch.randn(4, 8))
        before = module.scale.clone()
        assert cast(module).scale.dtype == torch.float32
        assert torch.equal(module.scale, before)


@demand("a net of 10 layers is one graph")
def _(lib: Any) -> None:
    graphs = []

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    model = net(lib)
    compiled = torch.compile(model, backend=count)
    for _step in range(2):
        compiled(torch.randn(4, 8)).sum().backward()
    assert len(graphs) == 1
    assert all(layer.fc.weight.grad is not None for layer in model)


def exports(lib: Any, layers: int, strict: bool) -> None:
    model = net(lib, layers)
    dynamic = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(copy.deepcopy(model), (torch.randn(4, 8),), dynamic_shapes=dynamic, strict=strict)
    module = exported.module()
    for size in (0, 1, 7):
        x = torch.randn(size, 8)
        y, expected = module(x), model(x)
        assert y.shape == (size, 8)
        assert torch.equal(y, expected)


for strict in (True, False):
    demand(f"a layer exports (strict={strict}) with a batch of 0, 1, n")(
        lambda lib, strict=strict: exports(lib, 1, strict)
    )


@demand("eval() freezes the observer")
def _(lib: Any) -> None:
    module = lib.FakeQuantize()
    module(torch.randn(4, 8))
    before = copy.deepcopy(module.state_dict())
    module.eval()(torch.randn(4, 8) * 100)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@demand("a module made on the meta device is as good as new")
def _(lib: Any) -> None:
    for make in (lib.FakeQuantize, lib.default_fused_per_channel_wt_fake_quant):
        with torch.device("meta"):
            module = make()
        module = module.to_empty(device="cpu")
        for buffer in module.buffers():
            buffer.fill_(77)  # what memory happens to hold
        module.reset_parameters()
        x = torch.randn(4, 8)
        assert torch.equal(module(x), make()(x))


for name, spoilt in (
    ("scale", torch.tensor([torch.nan])),
    ("scale", torch.tensor([-1.0])),
    ("zero_point", torch.tensor([300], dtype=torch.int32)),
    ("scale", torch.ones(3)),
):

    @demand(f"a saved {name} of {spoilt.tolist()} is refused by name")
    def _(lib: Any, name: str = name, spoilt: Tensor = spoilt) -> None:
        module = nn.Sequential(lib.FakeQuantize())
        module(torch.randn(4, 8))
        saved = module.state_dict() | {f"0.{name}": spoilt}
        with pytest.raises(RuntimeError, match=f"0.{name}"):
            nn.Sequential(lib.FakeQuantize()).load_state_dict(saved)


@demand("an empty batch is passed over")
def _(lib: Any) -> None:
    module = per_channel(lib, ch_axis=1)
    assert module(torch.randn(0, 8)).shape == (0, 8)
    x = torch.randn(4, 8)
    assert torch.equal(module(x), per_channel(lib, ch_axis=1)(x))


@demand("ch_axis=-1 is the last dimension")
def _(lib: Any) -> None:
    last, same = per_channel(lib, ch_axis=-1), per_channel(lib, ch_axis=2)
    x = torch.randn(2, 3, 5)
    assert torch.equal(last(x), same(x))
    assert last.scale.shape == (5,)


@demand("another number of channels is one clear error")
def _(lib: Any) -> None:
    module = per_channel(lib, ch_axis=0)
    module(torch.randn(4, 8))
    with pytest.raises(QpassError, match=r"ranges of shape \(4,\), but this tensor has \(5,\)"):
        module(torch.randn(5, 8))


@demand("vmap maps it")
def _(lib: Any) -> None:
    for module in (lib.FakeQuantize(), per_channel(lib)):
        x = torch.randn(3, 4, 8)
        module(x[0])
        module.eval()
        expected = torch.stack([module(row) for row in x])
        assert torch.equal(torch.func.vmap(module)(x), expected)


@demand("int4 codes")
def _(lib: Any) -> None:
    module = lib.FakeQuantize(dtype=torch.int4, qscheme=torch.per_tensor_symmetric)
    x = torch.arange(-15, 16) / 2
    assert torch.equal(module(x), (x.round().clamp(-8, 7)))


FAILURES: Any = (Exception, pytest.fail.Exception)  # the second is what pytest.raises itself raises


@pytest.mark.filterwarnings("ignore")  # torch's modules warn that they will move
@pytest.mark.parametrize("row", DEMANDS)
def test_torch_fails_where_qpass_holds(row: str) -> None:
    with pytest.raises(FAILURES) as failure:
        DEMANDS[row](torchs)
    torch._dynamo.reset()
    reason = (str(failure.value).strip().splitlines() or [""])[0][:90]
    print(f"{row:<60} torch: {failure.type.__name__}: {reason}")
    DEMANDS[row](QPASS)
    print(f"{row:<60} qpass: holds")


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_a_net_of_10_layers_exports(strict: bool) -> None:
    exports(QPASS, 10, strict)
