from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from qpass.arithmetic import numerics
from qpass.arithmetic.decompositions import table
from qpass.fake_quantize import FakeQuantize
from qpass.observer import (
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    MovingAveragePerChannelMinMaxObserver,
    ObserverBase,
    PerGroupMinMaxObserver,
    PlaceholderObserver,
)
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec
from qpass.spec.quantization_spec import Granularity

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
RANGES = {
    "int8": (torch.int8, True, -127, 127),
    "uint8": (torch.uint8, False, 0, 255),
    "int4": (torch.int8, True, -8, 7),
    "int16": (torch.int16, False, -32768, 32767),
}
GRANULARITIES: dict[str, tuple[Granularity, Any]] = {
    "tensor": (PerTensor(), MovingAverageMinMaxObserver),
    "channel": (PerChannel(1), MovingAveragePerChannelMinMaxObserver),
    "last": (PerChannel(-1), MovingAveragePerChannelMinMaxObserver),
    "group": (PerGroup(4), PerGroupMinMaxObserver),
}


def made(granularity: str, codes: str) -> FakeQuantize:
    dtype, symmetric, low, high = RANGES[codes]
    kind, observer = GRANULARITIES[granularity]
    make = FakeQuantize.with_args(observer=observer)
    spec = QuantizationSpec(dtype, kind, symmetric, quant_min=low, quant_max=high, observer=make)
    module = spec.make_observer()
    assert isinstance(module, FakeQuantize)
    assert isinstance(module, ObserverBase)
    assert module.spec is spec
    assert module.activation_post_process.spec is spec
    return module


def values(dtype: torch.dtype) -> Tensor:
    """[5, 8] values, some of them beyond what was observed, on ties, infinite and NaN."""
    x = torch.randn(5, 8, dtype=torch.float64) * 3
    x[0, :6] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e4, -1e4])
    return x.to(dtype)


def codes_of(x: Tensor, module: FakeQuantize) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unclamped codes (float64), clamped ones, scale and zero point that broadcast with `x`: as convert computes."""
    scale, zero_point = module.calculate_qparams()
    assert scale.dtype == torch.float32
    assert zero_point.dtype == torch.int32
    granularity = module.spec.granularity
    if isinstance(granularity, PerTensor):
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    elif isinstance(granularity, PerGroup):
        scale, zero_point = (q.repeat_interleave(granularity.group_size, -1) for q in (scale, zero_point))
    elif granularity.axis == 0:
        scale, zero_point = scale[:, None], zero_point[:, None]
    wide = numerics.unclamped(x, scale, zero_point, module.dtype).double()
    return wide, numerics.quantize(x, scale, zero_point, *module.spec.range, module.dtype), scale, zero_point


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def ways(module: FakeQuantize, x: Tensor) -> dict[str, Callable[[Tensor], Tensor]]:
    """The module and its exports, which share its switches."""
    exports = {
        f"strict={strict}": torch.export.export(module, (x,), strict=strict).module() for strict in (True, False)
    }
    return {"eager": module, **exports}


def differentiated(module: Callable[[Tensor], Tensor], x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(grad)
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codes", RANGES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_values_are_those_of_the_codes_and_gradients_pass_inside(
    granularity: str, codes: str, dtype: torch.dtype
) -> None:
    module = made(granularity, codes)
    module(torch.randn(5, 8, dtype=dtype))
    module.eval()
    x, grad = values(dtype), torch.randn(5, 8).to(dtype)
    wide, clamped, scale, zero_point = codes_of(x, module)
    low, high = module.spec.range
    inside = (wide >= low) & (wide <= high)
    assert 0 < inside.sum() < x.numel()
    expected = numerics.dequantize(clamped, scale, zero_point, dtype)
    y, x_grad = differentiated(module, x, grad)
    assert y.dtype == dtype
    assert torch.equal(bits(y), bits(expected))
    assert torch.equal(bits(module(x)), bits(expected))  # without a gradient another branch is taken
    assert torch.equal(bits(x_grad), bits(torch.where(inside, grad, 0)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_off_means_untouched(granularity: str, training: bool) -> None:
    module = made(granularity, "int4")
    module(torch.randn(5, 8))
    x, grad = values(torch.float32), torch.randn(5, 8)
    grad[1, 1] = -0.0
    module.disable_fake_quant()
    module.train(training)
    for name, way in (ways(module, x) if granularity == "channel" else {"eager": module}).items():
        if name != "eager":
            way.fake_quant_enabled[0] = 0  # type: ignore[attr-defined]
        y, x_grad = differentiated(way, x, grad)
        assert torch.equal(bits(y), bits(x)), name
        assert torch.equal(bits(x_grad), bits(grad)), name


@pytest.mark.parametrize(
    ("granularity", "strict"), [("tensor", True), ("tensor", False), ("channel", False), ("group", False)]
)
def test_an_export_computes_what_eager_computes_and_obeys_the_switches(granularity: str, strict: bool) -> None:
    eager = made(granularity, "uint8")
    eager(torch.randn(5, 8))
    program = torch.export.export(copy.deepcopy(eager), (torch.randn(5, 8),), strict=strict)
    exported: Any = program.module()
    for fake_quant, observer in ((1, 1), (0, 1), (1, 0), (0, 0), (1, 1)):
        for module in (eager, exported):
            module.fake_quant_enabled[0], module.observer_enabled[0] = fake_quant, observer
        x = values(torch.float32)
        expected, found = (differentiated(module, x, torch.ones_like(x)) for module in (eager, exported))
        assert torch.equal(bits(expected[0]), bits(found[0]))
        assert torch.equal(bits(expected[1]), bits(found[1]))
        ours, theirs = eager.state_dict(), exported.state_dict()
        assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert eager.activation_post_process.batches == 1 + 3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("kind", [PerTensor(), PerToken()])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dynamic_rounds_as_the_dynamic_operators_do(kind: Granularity, symmetric: bool, dtype: torch.dtype) -> None:
    spec = QuantizationSpec(
        torch.int8, kind, symmetric, dynamic=True, observer=FakeQuantize.with_args(observer=PlaceholderObserver)
    )
    module = spec.make_observer().eval()
    ops, kernels = torch.ops.quantized_decomposed, table()
    for x in (torch.randn(5, 8).to(dtype), torch.randn(2, 3, 8).to(dtype) * 100):
        if isinstance(kind, PerTensor):
            choose = ops.choose_qparams_symmetric.tensor if symmetric else ops.choose_qparams.tensor
            qparams = kernels[choose](x, *spec.range, module.eps, torch.int8)
            codes = kernels[ops.quantize_per_tensor.tensor](x, *qparams, *spec.range, torch.int8)
            scale, zero_point = (q.reshape(()) for q in qparams)
        else:
            op = ops.choose_qparams_per_token if symmetric else ops.choose_qparams_per_token_asymmetric
            scale, zero_point = kernels[op.default](x, torch.int8)
            codes = kernels[ops.quantize_per_token.default](x, scale, zero_point, *spec.range, torch.int8)
        assert torch.equal(module(x), numerics.dequantize(codes, scale, zero_point, dtype))


def test_one_graph_under_dynamo() -> None:
    net = nn.Sequential(FakeQuantize(MinMaxObserver, dtype=torch.int8), nn.Linear(8, 8), FakeQuantize())
    net(torch.randn(5, 8))
    graphs = []

    def count(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    compiled = torch.compile(net, backend=count, fullgraph=True)
    for flag in (1, 0, 1):
        net[0].observer_enabled[0] = flag
        net[2].fake_quant_enabled[0] = flag
        compiled(torch.randn(5, 8))
    assert len(graphs) == 1


@pytest.mark.parametrize("kind", ["tensor", "channel", "group"])
def test_a_compiled_backward_is_given_no_mask(kind: str) -> None:
    """Inductor's partitioner by itself saves the bools "inside", which its CPU kernels read and write one at a time."""
    module = made(kind, "uint8")
    module(torch.randn(5, 8))
    given: list[torch.dtype] = []

    def backward(gm: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        given.extend(t.dtype for t in inputs if t.numel() == 40)
        return gm.forward

    backend = aot_autograd(
        fw_compiler=lambda gm, _: gm.forward,
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
    )
    x, grad = values(torch.float32), torch.randn(5, 8)
    module.disable_observer()
    expected = differentiated(module, x, grad)
    found = differentiated(torch.compile(module, backend=backend, fullgraph=True), x, grad)
    assert given == [torch.float32, torch.float32]  # x and the gradient
    assert torch.equal(bits(found[0]), bits(expected[0]))
    assert torch.equal(bits(found[1]), bits(expected[1]))
