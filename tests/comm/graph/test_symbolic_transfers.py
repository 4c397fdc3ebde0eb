"""What a graph for symbolic sizes sends is, at every size that its guards let in, what one for that size sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

import lockstep as send
from lockstep import lockstep, ops, traced, value
from qpass.comm import Policy
from qpass.comm.eager import schedule
from qpass.comm.graph.compress import compress
from qpass.comm.graph.passes import join_transfers
from qpass.comm.policy.cost import FORMS
from qpass.comm.wire import partition

COLUMNS = 50
ROWS = (8, 12, 116, 120, 256)
"""With pieces from 512 elements on, and 1 KiB joined at most: some of each, in whole rows of a payload or not."""


def sums(x: Tensor, world: int) -> tuple[Tensor, ...]:
    return send.all_reduce(x), send.all_reduce(x * 2, "avg"), send.all_reduce(x[:, :8] * 3)


def parts(x: Tensor, world: int) -> tuple[Tensor, ...]:
    return tuple(send.reduce_scatter(each, "sum", world) for each in (x, x * 2, x[:, :8] * 3))


def gathers(x: Tensor, world: int) -> tuple[Tensor, ...]:
    """The last one's input has its size from what is received, but none of its values."""
    first = send.all_gather(x, world)
    return first, send.all_gather(x[:, :8] * 2, world), send.all_gather(x.new_ones(first.shape), world)


def shared(x: Tensor, world: int) -> tuple[Tensor, ...]:
    """Beside a size of what is still on its way."""
    issue = ops.all_reduce(x, "max", "0")
    first = send.broadcast(x, 1)
    second = send.broadcast(x[:, :8] * issue.shape[0], 1)
    return first, second, send.wait(issue)


def compiled(function: Callable[..., object], x: Tensor, form: str, world: int, dynamic: bool) -> fx.GraphModule:
    gm = traced(lambda x: function(x, world), x, world=world, dynamic=dynamic)
    return compress(gm, Policy(form, tuple(FORMS), 0), inductor=True)


def lets_in(gm: fx.GraphModule, x: Tensor) -> bool:
    """Whether the guards of a graph hold for another input."""
    (given,) = gm.graph.find_nodes(op="placeholder")
    val = given.meta["val"]
    sizes = {
        symbolic.node.expr: size
        for symbolic, size in zip(val.shape, x.shape, strict=True)
        if isinstance(symbolic, torch.SymInt)
    }
    return all(bool(guard.expr.xreplace(sizes)) for guard in val.fake_mode.shape_env.guards)


def are_equal(results: list[Any], others: list[Any]) -> bool:
    """Whether every rank has the same bits in both."""
    pairs = zip(tree_leaves(results), tree_leaves(others), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize(
    ("function", "form", "world"),
    [
        (sums, "int8", 2), (sums, "int8", 4), (sums, "int4:32:bf16:hadamard", 4), (parts, "int8", 4),
        (gathers, "int8", 2), (shared, "int8", 2),
    ],
)  # fmt: skip
def test_the_same_transfers_in_the_same_order(
    function: Callable[..., object], form: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "CHUNK", 512)
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", 0)
    monkeypatch.setattr(join_transfers, "LARGEST", 1 << 10)
    runs = {rows: [(value(rank, rows, COLUMNS),) for rank in range(world)] for rows in ROWS}
    known = {}
    for rows, run in runs.items():
        sent: list[tuple[str, int]] = []
        gm = compiled(function, run[0][0], form, world, dynamic=False)
        results = lockstep(gm, run, sent=sent)
        whole = compress(traced(lambda x: function(x, world), *run[0], world=world), Policy(form, tuple(FORMS), 0))
        reference = lockstep(whole, run)
        assert are_equal(results, reference)
        known[rows] = sent, reference
    assert len({len(sent) for sent, _ in known.values()}) > 1  # what is decided depends on sizes
    others = 0
    for hint in (116, 256):
        gm = compiled(function, runs[hint][0][0], form, world, dynamic=True)
        gm.graph.lint()
        assert lets_in(gm, runs[hint][0][0])
        for rows, (expected, reference) in known.items():
            if lets_in(gm, runs[rows][0][0]):
                sent = []
                results = lockstep(gm, runs[rows], sent=sent)
                assert sent == expected, (hint, rows)
                others += rows != hint
                assert are_equal(results, reference)
    assert others  # sizes were not specialized
