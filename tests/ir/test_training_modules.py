"""Each module against torch's own of the same name, in both modes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.ir.training_modules import Attention, BatchNorm, Dropout, FoldedBias, FoldedWeight, FoldFactor

ON, OFF = torch.ones(1, dtype=torch.uint8), torch.zeros(1, dtype=torch.uint8)


def settled(momentum: float | None = 0.1, affine: bool = True) -> nn.BatchNorm2d:
    """A batch norm whose every parameter and statistic is away from where it starts."""
    norm = nn.BatchNorm2d(4, eps=1e-3, momentum=momentum, affine=affine)
    for tensor in (*norm.parameters(), norm.running_mean, norm.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    return norm


def parts(norm: nn.BatchNorm2d) -> tuple[Tensor | None, ...]:
    return norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.num_batches_tracked


@pytest.mark.parametrize(
    ("kind", "function"),
    [("dropout", F.dropout), ("feature_dropout", F.dropout2d), ("alpha_dropout", F.alpha_dropout)],
)
def test_dropout_draws_what_torchs_draws(kind: str, function: object) -> None:
    x, module = torch.randn(8, 4, 5, 5), Dropout(kind, 0.3)
    torch.manual_seed(1)
    expected = function(x, 0.3, training=True)  # type: ignore[operator]
    torch.manual_seed(1)
    assert torch.equal(module(x), expected)
    assert not torch.equal(expected, x)
    assert module.eval()(x) is x


def test_attention_drops_in_training_only() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    module = Attention(0.5)
    torch.manual_seed(1)
    expected = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5, is_causal=True, scale=0.2)
    torch.manual_seed(1)
    assert torch.equal(module(q, k, v, None, True, 0.2), expected)
    assert torch.equal(module.eval()(q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.3, None])
def test_a_batch_norm_is_torchs(momentum: float | None, affine: bool) -> None:
    norm = settled(momentum, affine)
    twin, module = copy.deepcopy(norm), BatchNorm(norm.eps, momentum)
    for step in range(4):
        training = step != 2
        norm.train(training), module.train(training)
        x = torch.randn(3, 4, 5, 5) * 3 + 1
        assert torch.equal(module(x, *parts(twin)), norm(x))
    for own, theirs in zip(twin.state_dict().values(), norm.state_dict().values(), strict=True):
        # An average over all batches divides by their number in float32, where torch's takes float64.
        torch.testing.assert_close(own, theirs, rtol=0 if momentum else 1e-6, atol=0)


def test_frozen_statistics_stay_and_are_used() -> None:
    norm = settled()
    module, x, mean = BatchNorm(norm.eps, 0.3), torch.randn(3, 4, 5, 5), norm.running_mean.clone()
    module.freeze_batch_norm_stats()
    assert torch.equal(module(x, *parts(norm)), norm.eval()(x))
    assert torch.equal(norm.running_mean, mean)
    assert norm.num_batches_tracked == 0
    module.train().update_batch_norm_stats()
    assert torch.equal(module(x, *parts(norm)), copy.deepcopy(norm).train()(x))
    assert norm.num_batches_tracked == 1


class Folded(nn.Module):
    """A convolution and its batch norm as a prepared graph calls them, with nothing rounded in between."""

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, enabled: Tensor) -> None:
        super().__init__()
        self.conv, self.norm, self.enabled = conv, norm, enabled
        self.batch_norm = BatchNorm(norm.eps, norm.momentum)
        self.factor, self.weight, self.bias = FoldFactor(self.batch_norm), FoldedWeight(), FoldedBias(self.batch_norm)

    def forward(self, x: Tensor) -> Tensor:
        gamma, beta, mean, var, count = parts(self.norm)
        factor = self.factor(gamma, var, self.enabled)
        w = self.weight(self.conv.weight, factor)
        b = self.bias(self.conv.bias, factor, beta, mean, self.enabled)
        return self.batch_norm(F.conv2d(x, w, b), gamma, beta, mean, var, count, factor, self.enabled)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_folded_convolution_computes_what_the_two_do(bias: bool, affine: bool) -> None:
    conv, norm = nn.Conv2d(3, 4, 3, bias=bias), settled(affine=affine)
    x = torch.randn(5, 3, 6, 6)
    for enabled in (ON, OFF):
        own = Folded(copy.deepcopy(conv), copy.deepcopy(norm), enabled)
        plain = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm))
        for training in (True, False, True):
            own.train(training), plain.train(training)
            y, expected = own(x), plain(x)
            if enabled is OFF:
                assert torch.equal(y, expected)
            else:  # 27 products below 8, scaled before they are summed and not after: 30 roundings of 2**-24 of 30
                torch.testing.assert_close(y, expected, atol=6e-5, rtol=0)
            (own_grads, grads) = (
                torch.autograd.grad(out.square().sum(), m.parameters()) for out, m in ((y, own), (expected, plain))
            )
            for a, b in zip(own_grads, grads, strict=True):  # sums of 80 such values, each of up to 60
                torch.testing.assert_close(a, b, atol=5e-2, rtol=1e-3)
        for a, b in zip(own.norm.state_dict().values(), plain[1].state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # a tenth of the values above, averaged
