from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from qpass.capture.export import capture
from qpass.errors import InputError
from tests.capture.test_capture import Net, images, notes


class BranchOnOne(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() if x.shape[0] == 1 else x.sin()


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(4, -1) * torch.arange(4.0)[:, None]


class ManyPaths(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.exp() if x.shape[0] <= 8 else x.sin()


def test_a_branch_on_batch_one_is_refused_and_noted() -> None:
    gm = capture(BranchOnOne(), (torch.randn(4, 4),))
    assert notes(gm) == ["a batch of size 1 is refused: the model takes another path for it"]
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), x.sin())
    with pytest.raises(InputError, match="dimension 0 of input 'x' must be other than 1"):
        gm(torch.randn(1, 4))


def test_an_example_of_batch_one_that_takes_another_path_keeps_it() -> None:
    gm = capture(BranchOnOne(), (torch.randn(1, 4),))
    assert notes(gm) == ["the batch size is fixed to 1: the model takes another path for other sizes"]
    x = torch.randn(1, 4)
    assert torch.equal(gm(x), x.exp())
    with pytest.raises(InputError, match=r"input 'x' has the sizes \[2, 4\], .* captured for \[1, 4\]"):
        gm(torch.randn(2, 4))


def test_a_fixed_batch_is_noted_and_asserted() -> None:
    gm = capture(FixedBatch(), (torch.randn(4, 4),))
    assert notes(gm) == ["the batch size is fixed to 4: the model's code holds for no other"]
    with pytest.raises(InputError, match=r"input 'x' has the sizes \[8, 4\], .* captured for \[4, 4\]"):
        gm(torch.randn(8, 4))


def test_a_bound_on_the_batch_is_asserted() -> None:
    gm = capture(ManyPaths(), (torch.randn(4, 4),))
    with pytest.raises(InputError, match="dimension 0 of input 'x' must be at most 8"):
        gm(torch.randn(9, 4))


def test_where_a_dynamic_batch_cannot_be_exported_it_is_fixed_and_the_reason_noted() -> None:
    class Rejects(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x.shape[0], int):
                raise ValueError("sizes must be numbers")
            return x + 1

    gm = capture(Rejects(), (torch.randn(4, 4),))
    assert notes(gm) == ["the batch size is fixed to 4: torch.export cannot capture Rejects: sizes must be numbers"]
    assert gm(torch.zeros(4, 4)).eq(1).all()


def test_given_dynamic_shapes_are_taken_as_they_are() -> None:
    gm = capture(Net().eval(), (images(2),), dynamic_shapes=({2: Dim.AUTO, 3: Dim.AUTO},))
    assert gm(torch.randn(2, 3, 10, 12)).shape == (2, 4)
    with pytest.raises(InputError, match=r"\[2, 3, any, any\]"):
        gm(images(3))
