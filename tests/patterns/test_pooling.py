from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpret import operators
from pipeline_run import Do, kernel_names, reason, run_stages

POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "adaptive_avg_pool2d": lambda x: F.adaptive_avg_pool2d(x, 3),
    "mean.dim": lambda x: x.mean((2, 3), keepdim=True),
}


@pytest.mark.parametrize("name", POOLS)
def test_codes_are_read_behind_a_convolution(name: str) -> None:
    model = Do(lambda m, x: m.b(POOLS[name](m.a(x)).flatten(1)), a=nn.Conv2d(4, 4, 3), b=nn.LazyLinear(8))
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        model(x)
    r = run_stages(model, x)
    assert kernel_names(r.lowered) == ["onednn.qconv with quantize", "fused loop", "onednn.qlinear"]
    assert f"= {name}(dequantize_per_tensor_1" in operators(r.lowered)


def test_a_pool_in_one_dimension() -> None:
    model = Do(lambda m, x: m.b(F.adaptive_avg_pool1d(m.a(x), 1)), a=nn.Conv1d(4, 4, 3), b=nn.Conv1d(4, 4, 1))
    r = run_stages(model, torch.randn(2, 4, 8))
    assert kernel_names(r.lowered) == ["onednn.qconv with quantize", "fused loop", "onednn.qconv"]


def test_a_pool_elsewhere_stays_in_float() -> None:
    model = Do(lambda m, x: m.a(F.avg_pool2d(x, 2)), a=nn.Conv2d(4, 4, 3))
    expected = "pays only where a quantized conv stands before it"
    assert reason(model, torch.randn(2, 4, 8, 8), op="avg_pool2d") == expected


def test_an_adaptive_maximum_stays_in_float() -> None:
    """It returns indices too, so codes do not pass through it."""
    model = Do(lambda m, x: m.b(F.adaptive_max_pool2d(m.a(x), 3)), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3))
    r = run_stages(model, torch.randn(2, 4, 8, 8))
    assert kernel_names(r.lowered) == ["onednn.qconv", "onednn.qconv"]
