from __future__ import annotations

import functools

import pytest
import torch

from lockstep import applied, coded, lockstep, reduce_scatter, text, traced, value
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.graph.rules.reduce_scatter import ReduceScatterPayloads
from qpass.comm.policy.policy import Policy
from qpass.comm.wire.codec import codec


def test_each_rank_sums_the_payloads_of_its_part() -> None:
    gm = traced(lambda x: reduce_scatter(coded(x), "avg"), value(0, 4, 128))
    assert text(gm)[3:5] == [
        "reduce_scatter_tensor = reduce_scatter_tensor(view, avg, 2, 0)",
        "wait_tensor = wait_tensor(reduce_scatter_tensor)",
    ]
    assert applied(gm, ReduceScatterPayloads()).fired == {"ReduceScatterPayloads": 1}
    assert text(gm) == [
        "encode = encode(x, int8:128:bf16)",
        "all_to_all_single = all_to_all_single(encode, [260, 260], [260, 260], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "view = view(wait_tensor, [2, 260])",
        "decode_reduce = decode_reduce(view, 256, float32, int8:128:bf16, 2)",
        "view_1 = view(decode_reduce, [2, 128])",
        "return view_1",
    ]
    assert applied(gm, ReduceScatterPayloads()).count == 0


@pytest.mark.parametrize(
    ("form", "op", "world"),
    [("int8:128:bf16", "sum", 2), ("int8:128:bf16", "avg", 4), ("int4:32:bf16:hadamard", "avg", 3), ("bf16", "sum", 4)],
)
@pytest.mark.parametrize("row", [43, 256])
def test_float32_sums_are_equal_bit_for_bit_in_the_order_of_ranks(row: int, form: str, op: str, world: int) -> None:
    """The reference here sums in that order, too; a transport may not, which is what the rule says."""
    inputs = [(value(rank, world * 3, row),) for rank in range(world)]
    gm = traced(lambda x: reduce_scatter(x, op, world), *inputs[0], world=world)
    assert InsertCodecs(Policy(form, min_bytes=0)).run(gm).changed == 1
    before = lockstep(gm, inputs)
    assert applied(gm, ReduceScatterPayloads()).count == 1
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    inputs = [(value(rank, 4, 128, dtype=torch.bfloat16),) for rank in range(4)]
    gm = traced(lambda x: reduce_scatter(coded(x), "sum", 4), *inputs[0], world=4)
    before = torch.cat(lockstep(gm, inputs))
    applied(gm, ReduceScatterPayloads())
    after = torch.cat(lockstep(gm, inputs))
    terms = [codec("int8").decode(codec("int8").encode(x), x.numel()) for (x,) in inputs]
    assert torch.equal(after, functools.reduce(torch.add, terms).to(torch.bfloat16).view(4, 128))
    # The reference rounds 4 terms and 3 partial sums to bfloat16, the rule 1 sum, each by 2^-9 of what is rounded.
    size = sum(x.double().abs() for (x,) in inputs)
    assert ((before.double() - after.double()).abs() <= 8 * 2.0**-9 * size).all()
    assert not torch.equal(after, before)


def test_near_misses_are_declined() -> None:
    def reason(gm: torch.fx.GraphModule) -> list[str]:
        done = applied(gm, ReduceScatterPayloads())
        assert done.count == 0
        return [why for _, _, why in done.refused]

    x = value(0, 4, 50)
    assert reason(traced(lambda x: reduce_scatter(coded(x), "max"), x)) == ["a max cannot be taken over payloads"]
    assert reason(traced(reduce_scatter, x)) == ["the values that are sent were not decoded from a payload"]
    assert reason(traced(lambda x: reduce_scatter(coded(x)), x)) == ["the payload does not come apart into 2 payloads"]
