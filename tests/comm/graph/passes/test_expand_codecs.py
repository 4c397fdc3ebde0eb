from __future__ import annotations

import pytest
import torch

import lockstep as send
from lockstep import lockstep, traced, value
from qpass.comm.graph.passes.expand_codecs import ExpandCodecs
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.policy.policy import Policy
from qpass.comm.wire.operators import FORMULAS


@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("int8", torch.float32), ("int4", torch.bfloat16), ("mxfp8", torch.float32),
        ("int8:128:bf16:hadamard", torch.float32),
    ],
)  # fmt: skip
def test_the_written_out_arithmetic_is_the_operators_bit_for_bit(form: str, dtype: torch.dtype) -> None:
    inputs = [(value(rank, 4, 75, dtype=dtype),) for rank in range(2)]
    gm = traced(lambda x: (send.reduce_scatter(x), send.all_gather(x)), *inputs[0])
    assert InsertCodecs(Policy(form, min_bytes=0)).run(gm).changed == LowerCollectives().run(gm).changed == 2
    gm.graph.eliminate_dead_code()
    before = lockstep(gm, inputs)
    step = ExpandCodecs()
    assert step.run(gm).changed == 4  # two are encoded, one is decoded, one decoded and summed
    gm.graph.lint()
    assert not any(node.target in FORMULAS for node in gm.graph.nodes)
    for after, reference in zip(lockstep(gm, inputs), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(after, reference, strict=True))
    assert step.run(gm).changed == 0
