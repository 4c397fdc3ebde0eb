from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lockstep as send
from lockstep import coded, lockstep, text, traced, value
from qpass.comm.eager import schedule
from qpass.comm.graph.collective import KINDS
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.policy.policy import Policy
from qpass.ir.record import record_of

ALL = Policy("int8", min_bytes=0)


def both(x: Tensor) -> tuple[Tensor, Tensor]:
    """A sum for all and a part for each, both under way at once."""
    summed = send.ops.all_reduce(x, "sum", "0")
    scattered = send.ops.reduce_scatter_tensor(x, "avg", 4, "0")
    between = x.exp()
    return send.wait(summed) + between, send.wait(scattered)


def test_two_walks_lower_everything_and_keep_the_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", 0)
    inputs = [(value(rank, 4096),) for rank in range(4)]
    gm = traced(both, *inputs[0], world=4)
    assert InsertCodecs(ALL).run(gm).changed == 2
    before = lockstep(gm, inputs)
    step = LowerCollectives()
    assert step.run(gm).changed == 2
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    order = [line.split(" = ")[0] for line in text(gm)]
    first, second, third = (order.index(name) for name in ("all_to_all_single", "all_to_all_single_1", "exp"))
    assert first < second < third < order.index("wait_tensor") < order.index("all_gather_into_tensor")
    for after, reference in zip(lockstep(gm, inputs), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(after, reference, strict=True))
    records = [record_of(node) for node in gm.graph.nodes if node.target in KINDS]
    assert [(r.op, r.outcome, r.reason) for r in records if r is not None] == [
        ("all_reduce", "lowered", "16,384 -> 4,160 bytes"),
        ("reduce_scatter", "lowered", "16,384 -> 4,160 bytes"),
    ]
    once = text(gm)
    assert step.run(gm).changed == 0
    assert text(gm) == once


def test_a_sum_that_cannot_go_in_two_shots_goes_in_one() -> None:
    rotated = "int8:128:bf16:hadamard"
    inputs = [(value(rank, 200),) for rank in range(3)]
    gm = traced(lambda x: coded(send.all_reduce(coded(x, rotated)), rotated), *inputs[0], world=3)
    before = lockstep(gm, inputs)
    assert LowerCollectives().run(gm).changed == 1
    gm.graph.eliminate_dead_code()
    assert "\n".join(text(gm)).count("all_gather_into_tensor(") == 1
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))
