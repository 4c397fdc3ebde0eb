from __future__ import annotations

import pytest
import torch

from lockstep import all_to_all, applied, coded, lockstep, text, traced, value
from qpass.comm.policy import Policy
from qpass.passes.insert_codecs import InsertCodecs
from qpass.patterns.all_to_all import ExchangePayloads
from qpass.rewrite.collective import EVEN_KEY


def test_payloads_are_exchanged_instead_of_values() -> None:
    gm = traced(lambda x: all_to_all(coded(x)), value(0, 4, 128))
    assert text(gm)[3:5] == [
        "all_to_all_single = all_to_all_single(view, [2, 2], [2, 2], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
    ]
    assert applied(gm, ExchangePayloads()).fired == {"ExchangePayloads": 1}
    assert text(gm) == [
        "encode = encode(x, int8:128:bf16)",
        "all_to_all_single = all_to_all_single(encode, [260, 260], [260, 260], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "decode = decode(wait_tensor, 512, float32, int8:128:bf16)",
        "view = view(decode, [4, 128])",
        "return view",
    ]
    assert applied(gm, ExchangePayloads()).count == 0


@pytest.mark.parametrize(
    ("form", "dtype", "world"),
    [
        ("int8:128:bf16", torch.float32, 2), ("int8:128:bf16", torch.bfloat16, 4), ("bf16", torch.float32, 3),
        ("int4:32:bf16:hadamard", torch.float32, 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("row", [43, 256])
def test_bit_for_bit_also_where_parts_end_inside_a_row(row: int, form: str, dtype: torch.dtype, world: int) -> None:
    inputs = [(value(rank, world * 3, row, dtype=dtype),) for rank in range(world)]
    gm = traced(lambda x: all_to_all(x, world), *inputs[0], world=world)
    assert InsertCodecs(Policy(form, "all_to_all", 0)).run(gm) == 1
    before = lockstep(gm, inputs)
    assert applied(gm, ExchangePayloads()).count == 1
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))
    plain = lockstep(traced(lambda x: all_to_all(x, world), *inputs[0], world=world), inputs)
    assert not all(torch.equal(a, b) for a, b in zip(plain, before, strict=True))


def test_near_misses_are_declined() -> None:
    def reason(gm: torch.fx.GraphModule) -> list[str]:
        done = applied(gm, ExchangePayloads())
        assert done.count == 0
        return [why for _, _, why in done.refused]

    x = value(0, 4, 50)
    unproven = traced(lambda x: all_to_all(coded(x)), value(0, 4, 128))
    for node in unproven.graph.nodes:
        del node.meta[EVEN_KEY]
    assert reason(unproven) == ["nothing promises that its parts are equal on every rank"]
    assert reason(traced(all_to_all, x)) == ["the values that are sent were not decoded from a payload"]
    assert reason(traced(lambda x: all_to_all(coded(x), splits=[1, 3]), x)) == ["its parts are not equal"]
    # Four rows of 64 of which 32 are kept: two rows of the payload, and no four payloads.
    kept = traced(lambda x: all_to_all(coded(x)[:, :32], 4), value(0, 4, 64), world=4)
    assert reason(kept) == ["the values that are sent were not decoded from a payload"]
    assert reason(traced(lambda x: all_to_all(coded(x)), x)) == ["the payload does not come apart into 2 payloads"]
