from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from qpass.capture.graph_comparison import same_operators


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.fc(x)).relu()
        return y.view(x.shape[0], 2, 6).transpose(1, 2).reshape(x.shape[0], -1)[:, 0]


class Attention(nn.Module):
    """Its fake kernels ask whether the batch is 1, which changes strides and no operator."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class WithCond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cond(x.sum() > 0, lambda y: y.reshape(y.shape[0], -1).exp(), lambda y: y.flatten(1).sin(), (x,))


class OtherOperator(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() if x.shape[0] == 1 else x.sin()


class OtherArgument(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(1 if x.shape[0] == 1 else 2)


class OtherOperand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        a, b = x + 1, x + 2
        return (a if x.shape[0] == 1 else b).exp()


class OneMore(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sin()
        return y.clone() if x.shape[0] == 1 else y


class OtherInRegion(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        def branch(y: Tensor) -> Tensor:
            return y.exp() if y.shape[0] == 1 else y.cos()

        return torch.cond(x.sum() > 0, branch, lambda y: y.sin(), (x,))


class Strided(nn.Module):
    """Contiguous already where the batch is 1, and so traced without the copy."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 1:].contiguous().view(x.shape[0], -1).sin()


class WholeSlice(nn.Module):
    """A slice where the batch is dynamic, an alias where it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return x[slice(0, None), :].sin()


class StridedAndWritten(nn.Module):
    """Without the copy, the write reaches the input."""

    def forward(self, x: Tensor) -> Tensor:
        y = x[:, 1:].contiguous()
        y.add_(1)
        return x + 1


def traced_alike(model: nn.Module) -> bool:
    model.eval()
    several = export(model, (torch.randn(4, 3, 4),), dynamic_shapes=({0: Dim.AUTO},)).graph_module
    one = export(model, (torch.randn(1, 3, 4),)).graph_module
    return same_operators(several, one)


@pytest.mark.parametrize("model", [Plain, Attention, WithCond, Strided, WholeSlice])
def test_a_model_without_a_branch_on_the_batch_is_one_program(model: type[nn.Module]) -> None:
    assert traced_alike(model())


@pytest.mark.parametrize(
    "model", [OtherOperator, OtherArgument, OtherOperand, OneMore, OtherInRegion, StridedAndWritten]
)
def test_a_branch_on_the_batch_is_seen(model: type[nn.Module]) -> None:
    assert not traced_alike(model())
