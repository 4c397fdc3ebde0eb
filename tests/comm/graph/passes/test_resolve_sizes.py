"""Sizes of what is computed or received, read off the inputs of the graph."""

from __future__ import annotations

import operator

import torch
from torch import Tensor

import lockstep as send
from lockstep import lockstep, ops, text, traced, value
from qpass.comm.graph.passes.resolve_sizes import ResolveSizes


def from_received(x: Tensor) -> Tensor:
    """A tensor that has its size, and nothing else, from what is received."""
    received = send.all_gather(x[:, 1:])
    return received.new_ones(received.shape[1] + 3, received.shape[0]) * x[0, 0]


def test_a_size_is_computed_from_those_of_the_inputs() -> None:
    gm = traced(from_received, value(0, 6, 50), dynamic=True)
    inputs = [(value(rank, 8, 70),) for rank in range(2)]
    before = lockstep(gm, inputs)
    assert "sym_size_1 = sym_size.int(all_gather_into_tensor, 0)" in text(gm)
    assert ResolveSizes().run(gm).changed == 2
    gm.graph.lint()
    reads = [line.split(" = ")[1] for line in text(gm) if "sym_size.int(" in line]
    assert reads == ["sym_size.int(x, 1)", "sym_size.int(x, 0)"]
    (ones,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.new_ones.default)
    assert [size.target for size in ones.args[1]] == [operator.add, operator.mul]
    assert ResolveSizes().run(gm).changed == 0
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))


def test_what_comes_from_data_or_is_known_is_left() -> None:
    def chosen(x: Tensor) -> Tensor:
        found = ops.all_gather_into_tensor(x.nonzero(), 2, "0")
        return x.new_ones(found.shape[0])

    gm = traced(chosen, value(0, 6, 50), dynamic=True)
    assert ResolveSizes().run(gm).changed == 0
    assert ResolveSizes().run(traced(from_received, value(0, 6, 50))).changed == 0
