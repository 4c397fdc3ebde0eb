from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from lockstep import all_reduce, applied, coded, lockstep, text, traced, value
from qpass.comm.graph.collective import WORLD_KEY
from qpass.comm.graph.rules.all_reduce import AllReduceOneShot, AllReduceTwoShot
from qpass.comm.wire.codec import codec


def test_one_shot() -> None:
    gm = traced(lambda x: all_reduce(coded(x), "avg") + 1, value(0, 4, 50))
    assert text(gm)[3:5] == ["all_reduce = all_reduce(view, avg, 0)", "wait_tensor = wait_tensor(all_reduce)"]
    assert applied(gm, AllReduceOneShot()).fired == {"AllReduceOneShot": 1}
    assert text(gm) == [
        "encode = encode(x, int8:128:bf16)",
        "all_gather_into_tensor = all_gather_into_tensor(encode, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "view = view(wait_tensor, [2, 260])",
        "decode_reduce = decode_reduce(view, 200, float32, int8:128:bf16, 2)",
        "view_1 = view(decode_reduce, [4, 50])",
        "add = add.Tensor(view_1, 1)",
        "return add",
    ]
    assert applied(gm, AllReduceOneShot()).count == 0


def test_two_shot() -> None:
    gm = traced(lambda x: coded(all_reduce(coded(x))), value(0, 4, 100), world=3)
    assert text(gm)[3:7] == [
        "all_reduce = all_reduce(view, sum, 0)",
        "wait_tensor = wait_tensor(all_reduce)",
        "encode_1 = encode(wait_tensor, int8:128:bf16)",
        "decode_1 = decode(encode_1, 400, float32, int8:128:bf16)",
    ]
    assert applied(gm, AllReduceTwoShot()).fired == {"AllReduceTwoShot": 1}
    assert text(gm) == [  # 4 rows of 130 bytes: 2 for each of 3 ranks, of which the last one owns nothing
        "encode = encode(x, int8:128:bf16)",
        "constant_pad_nd = constant_pad_nd(encode, [0, 260])",
        "all_to_all_single = all_to_all_single(constant_pad_nd, [260, 260, 260], [260, 260, 260], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "view = view(wait_tensor, [3, 260])",
        "decode_reduce = decode_reduce(view, 256, float32, int8:128:bf16, 1)",
        "encode_1 = encode(decode_reduce, int8:128:bf16)",
        "all_gather_into_tensor = all_gather_into_tensor(encode_1, 3, 0)",
        "wait_tensor_1 = wait_tensor(all_gather_into_tensor)",
        "slice = slice.Tensor(wait_tensor_1, 0, 0, 520)",
        "decode = decode(slice, 400, float32, int8:128:bf16)",
        "view_1 = view(decode, [4, 100])",
        "return view_1",
    ]
    assert applied(gm, AllReduceTwoShot()).count == 0


@pytest.mark.parametrize(
    ("form", "op", "world"),
    [
        ("int8:128:bf16", "sum", 2), ("int8:128:bf16", "avg", 4), ("int4:32:bf16", "avg", 3), ("bf16", "sum", 4),
        ("fp8_e4m3:32:e8m0", "sum", 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 400, 2600])
def test_float32_sums_are_equal_bit_for_bit_in_the_order_of_ranks(size: int, form: str, op: str, world: int) -> None:
    """To the q/dq graph, whose reference sums in that order here, and to the definition of the eager schedules."""
    inputs = [(value(rank, size),) for rank in range(world)]
    how = codec(form)
    terms = [how.decode(how.encode(x), size) for (x,) in inputs]
    total = functools.reduce(torch.add, terms) / (world if op == "avg" else 1)
    for rule, rounds_sum, expected in (
        (AllReduceOneShot(), False, total),
        (AllReduceTwoShot(), True, how.decode(how.encode(total), size)),
    ):

        def function(x: Tensor, rounds_sum: bool = rounds_sum) -> Tensor:
            y = all_reduce(coded(x, form), op)
            return coded(y, form) if rounds_sum else y

        gm = traced(function, *inputs[0], world=world)
        before = lockstep(gm, inputs)
        assert applied(gm, rule).count == 1
        after = lockstep(gm, inputs)
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        assert all(torch.equal(a, expected) for a in after)


def test_a_block_that_overflowed_on_one_rank_is_lost_on_all_and_no_other() -> None:
    inputs = [(value(rank, 600),) for rank in range(3)]
    inputs[1][0][200] = float("inf")
    gm = traced(lambda x: coded(all_reduce(coded(x))), *inputs[0], world=3)
    applied(gm, AllReduceTwoShot())
    for result in lockstep(gm, inputs):
        assert result.isnan().nonzero().flatten().tolist() == list(range(128, 256))


def test_near_misses_are_declined() -> None:
    def reason(gm: torch.fx.GraphModule, rule: AllReduceOneShot | AllReduceTwoShot) -> list[str]:
        done = applied(gm, rule)
        assert done.count == 0
        return [why for _, _, why in done.refused]

    x, never = value(0, 4, 50), "the values that are sent were not decoded from a payload"
    rotated = "int8:128:bf16:hadamard"
    assert reason(traced(lambda x: all_reduce(coded(x), "max"), x), AllReduceOneShot()) == [
        "a max cannot be taken over payloads"
    ]
    assert reason(traced(all_reduce, x), AllReduceOneShot()) == [never]
    unknown = traced(lambda x: all_reduce(coded(x)), x)
    for node in unknown.graph.nodes:
        del node.meta[WORLD_KEY]
    assert reason(unknown, AllReduceOneShot()) == ["the number of ranks in its group is not known"]
    assert reason(traced(lambda x: coded(all_reduce(x)), x), AllReduceTwoShot()) == [never]
    assert reason(traced(lambda x: coded(all_reduce(coded(x)), "bf16"), x), AllReduceTwoShot()) == [
        "the sum is rounded as bf16 and its terms as int8:128:bf16"
    ]
    assert reason(traced(lambda x: coded(all_reduce(coded(x, rotated)), rotated), x), AllReduceTwoShot()) == [
        "the last row is not full, and rotating it would mix its padding into the values"
    ]
    random = "int8:128:bf16:stochastic"
    assert reason(traced(lambda x: coded(all_reduce(coded(x, random)), random), x), AllReduceTwoShot()) == [
        "every rank would round its part of the sum with the same random numbers"
    ]
    twice = traced(lambda x: (lambda y: coded(y) + y)(all_reduce(coded(x))), x)
    assert reason(twice, AllReduceTwoShot()) == []  # the sum is read as it is, too: no match
