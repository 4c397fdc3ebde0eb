from __future__ import annotations

import pytest
import torch

from lockstep import applied, broadcast, coded, lockstep, text, traced, value
from qpass.comm.graph.rules.broadcast import BroadcastPayload


def test_the_payload_is_sent_instead_of_the_values() -> None:
    gm = traced(lambda x: broadcast(coded(x), 1), value(0, 4, 50))
    assert text(gm)[3:5] == ["broadcast = broadcast(view, 1, 0)", "wait_tensor = wait_tensor(broadcast)"]
    assert applied(gm, BroadcastPayload()).fired == {"BroadcastPayload": 1}
    assert text(gm) == [
        "encode = encode(x, int8:128:bf16)",
        "broadcast = broadcast(encode, 1, 0)",
        "wait_tensor = wait_tensor(broadcast)",
        "decode = decode(wait_tensor, 200, float32, int8:128:bf16)",
        "view = view(decode, [4, 50])",
        "return view",
    ]
    assert applied(gm, BroadcastPayload()).count == 0


@pytest.mark.parametrize("form", ["int8:128:bf16", "int4:32:bf16:hadamard", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_for_bit(dtype: torch.dtype, form: str) -> None:
    inputs = [(value(rank, 4, 50, dtype=dtype),) for rank in range(3)]
    gm = traced(lambda x: broadcast(coded(x, form), 2), *inputs[0], world=3)
    before = lockstep(gm, inputs)
    applied(gm, BroadcastPayload())
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))


def test_values_that_were_never_a_payload_are_declined() -> None:
    done = applied(traced(broadcast, value(0, 4)), BroadcastPayload())
    assert done.nearest_miss == (
        "BroadcastPayload declined broadcast: the values that are sent were not decoded from a payload"
    )
