"""Copies of a module's tensors: what shared memory still does, and nothing is shared with the original."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpass.ir.ownership import own_tensors


class Aliases(nn.Module):
    """One storage of 64 floats with a parameter, two buffers that overlap and one that stands apart."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = torch.arange(64.0)
        self.weight = nn.Parameter(self.whole[:8].view(2, 4))
        self.tied = self.weight
        self.register_buffer("cache", self.whole[10:30])
        self.register_buffer("columns", self.whole[17:29].view(3, 4).t())
        self.register_buffer("words", self.whole[20:22].view(torch.int64))
        self.register_buffer("apart", self.whole[40:], persistent=False)
        self.register_buffer("other", torch.ones(3))


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_names_and_views_that_share_memory_share_it_in_the_copy() -> None:
    model = Aliases()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    own_tensors(model)
    assert model.tied is model.weight
    assert isinstance(model.weight, nn.Parameter)
    assert model.weight.requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
    assert [storage(t) == storage(model.whole) for t in (model.weight, model.cache, model.apart)] == [False] * 3
    assert model.columns.stride() == (1, 4)
    model.cache[8] = -1.0  # element 18 of all: [1, 0] of the columns
    assert model.columns[1, 0] == -1
    model.words.zero_()  # elements 20 and 21
    assert model.cache[10:12].tolist() == [0, 0]
    assert torch.equal(model.whole, torch.arange(64.0))


def test_a_copy_is_as_large_as_what_it_holds() -> None:
    """Weights that are slices of one file's memory are no reason to copy the file."""
    model = Aliases()
    own_tensors(model)
    sizes = {name: tensor.untyped_storage().nbytes() for name, tensor in model.state_dict().items()}
    assert sizes["weight"] == 32
    assert model.apart.untyped_storage().nbytes() == 24 * 4
    assert sizes["cache"] <= 20 * 4 + 16  # all three that overlap, from a multiple of 16 bytes on
    assert storage(model.cache) == storage(model.columns) == storage(model.words)


def test_only_what_is_shared_with_the_given_tensors_is_copied() -> None:
    model = Aliases()
    kept = model.other
    own_tensors(model, [model.whole])
    assert model.other is kept
    assert storage(model.weight) != storage(model.whole)
