"""Folding happens when a graph is converted, and is right however the convolution and its weight are shared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from interpret import operators
from pass_run import run_once
from pipeline_run import STATIC, Do, kernel_names, run_stages
from qpass.capture.export import capture
from qpass.ir.constants import Constants
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.fold_batch_norm import FoldBatchNorm
from qpass.quantize.passes.insert_observers import InsertObservers
from qpass.targets import X86


def settled(channels: int = 4, affine: bool = True) -> nn.BatchNorm2d:
    """A batch norm as training leaves it: every statistic away from where it started."""
    norm = nn.BatchNorm2d(channels, affine=affine)
    lows = {"running_mean": -1, "running_var": 0.5} | ({"weight": 0.5, "bias": -1} if affine else {})
    for tensor, low in ((getattr(norm, name), low) for name, low in lows.items()):
        nn.init.uniform_(tensor, low, low + 1.5)
    return norm


def prepared(model: nn.Module, x: Tensor) -> fx.GraphModule:
    gm = capture(model.eval(), (x,))
    Annotate(STATIC, X86).run(gm)
    InsertObservers().run(gm)
    return gm


IMAGE = (2, 4, 8, 8)


def test_the_norm_becomes_part_of_weight_and_bias() -> None:
    gm, x = prepared(nn.Sequential(nn.Conv2d(4, 4, 3), settled()), torch.randn(IMAGE)), torch.randn(IMAGE)
    before = gm(x)
    assert operators(gm).splitlines()[3:] == [
        "conv2d = conv2d(observer_0, observer_1, 0.bias)",
        "batch_norm = batch_norm(conv2d, 1.weight, 1.bias, 1.running_mean, 1.running_var, False, 0.1, 1e-05, False)",
        "return [batch_norm]",
    ]
    assert run_once(FoldBatchNorm(), gm, x) == 1
    assert operators(gm).splitlines()[2:] == [
        "add_scalar = add.Scalar(1.running_var, 1e-05)",
        "rsqrt = rsqrt(add_scalar)",
        "mul_tensor = mul.Tensor(rsqrt, 1.weight)",
        "sub_tensor = sub.Tensor(0.bias, 1.running_mean)",
        "mul_tensor_1 = mul.Tensor(sub_tensor, mul_tensor)",
        "add_tensor = add.Tensor(mul_tensor_1, 1.bias)",
        "reshape = reshape(mul_tensor, [-1, 1, 1, 1])",
        "mul_tensor_2 = mul.Tensor(0.weight, reshape)",
        "observer_1_folded = observer_1_folded(mul_tensor_2)",
        "conv2d = conv2d(observer_0, observer_1_folded, add_tensor, [1, 1], [0, 0], [1, 1], 1)",
        "return [conv2d]",
    ]
    # 36 products of values below 4, weights below 1/6 and factors below 3, in another order: 40 * 2**-24 * 36 * 2.
    torch.testing.assert_close(gm(x), before, atol=2e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_every_form_of_convolution_and_norm(bias: bool, affine: bool, groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3, bias=bias, groups=groups), settled(affine=affine))
    gm, x = prepared(model, torch.randn(IMAGE)), torch.randn(IMAGE)
    before = gm(x)
    run_once(FoldBatchNorm(), gm, x)
    torch.testing.assert_close(gm(x), before, atol=2e-4, rtol=0)  # as above
    (conv,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    assert conv.args[2] in Constants(gm)


# What follows is a fault each of the nearest relative: a convolution and its norms, shared.


class Shared(nn.Module):
    """One convolution, used twice; ``second`` says what the second use goes through."""

    def __init__(self, second: nn.Module | None) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), settled(), second

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(self.conv(x)))
        z = self.conv(torch.sin(x))
        return y - (z if self.second is None else self.second(z))


@pytest.mark.parametrize("second", [None, settled(), "the same"], ids=["no norm", "another norm", "the same norm"])
def test_a_convolution_that_is_used_twice(second: Any) -> None:
    model = Shared(None if second == "the same" else second).eval()
    if second == "the same":
        model.second = model.first
    x = torch.randn(IMAGE)
    r = run_stages(model, x)
    assert [name.partition(" ")[0] for name in kernel_names(r.lowered)][:2] == ["onednn.qconv", "onednn.qconv"]
    assert "batch_norm(" not in operators(r.quantized)
    # 8 bits and a result that is the difference of two: below 5 % of its size. Folding wrongly costs 50 % and more.
    expected = model(x)
    assert (r.quantized(x) - expected).norm() < 0.05 * expected.norm()


def test_a_convolution_whose_result_somebody_else_reads() -> None:
    model = Do(lambda m, x: (m.norm(y := m.conv(x)), y), conv=nn.Conv2d(4, 4, 3), norm=settled()).eval()
    x = torch.randn(IMAGE)
    r = run_stages(model, x)
    assert "batch_norm(" in operators(r.quantized)
    for got, expected in zip(r.quantized(x), model(x), strict=True):
        assert (got - expected).norm() < 0.05 * expected.norm()  # as above


def test_a_weight_that_two_convolutions_share_is_folded_into_each() -> None:
    w = nn.Parameter(torch.randn(4, 4, 3, 3) / 6)
    model = Do(lambda m, x: m.a(F.conv2d(x, m.w)) - m.b(F.conv2d(x, m.w)), a=settled(), b=settled(), w=w).eval()
    x = torch.randn(IMAGE)
    r = run_stages(model, x)
    scales = [scale for name, scale in r.quantized.named_buffers() if "_scale" in name]
    assert len(scales) == 2
    assert not torch.equal(*scales)  # a positive factor changes the scale of a channel and none of its codes
    expected = model(x)
    assert (r.quantized(x) - expected).norm() < 0.05 * expected.norm()  # as above


def test_the_model_keeps_its_parameters_and_its_prepared_form() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), settled()).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    r = run_stages(model, torch.randn(IMAGE))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert "batch_norm(" in operators(r.prepared)
