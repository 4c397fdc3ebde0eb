from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lockstep import all_to_all, applied, coded, lockstep, ops, text, traced, value, wait
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.graph.rules.all_to_all import ExchangeParts, ExchangePayloads, ExchangeRows
from qpass.comm.policy.policy import Policy
from qpass.ir.rule import Rule

INT8 = Policy("int8", "all_to_all", 0)


def uneven(x: Tensor) -> Tensor:
    """For a rank that sends one row to rank 0 and three to rank 1, and gets two from each."""
    return wait(ops.all_to_all_single(x, [2, 2], [1, 3], "0"))


def test_payloads_of_whole_rows_are_cut_like_their_values() -> None:
    gm = traced(lambda x: uneven(coded(x)), value(0, 4, 256))
    assert text(gm)[3:5] == [
        "all_to_all_single = all_to_all_single(view, [2, 2], [1, 3], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
    ]
    assert applied(gm, ExchangeRows()).fired == {"ExchangeRows": 1}
    assert text(gm) == [  # 256 elements are two rows of 130 bytes
        "encode = encode(x, int8:128:bf16)",
        "all_to_all_single = all_to_all_single(encode, [520, 520], [260, 780], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "decode = decode(wait_tensor, 1024, float32, int8:128:bf16)",
        "view = view(decode, [4, 256])",
        "return view",
    ]
    assert applied(gm, ExchangeRows()).count == 0


def test_equal_parts_are_padded_to_whole_rows() -> None:
    gm = traced(all_to_all, value(0, 4, 50))
    assert InsertCodecs(INT8).run(gm).changed == 1
    assert text(gm)[8] == "all_to_all_single = all_to_all_single(view_2, [2, 2], [2, 2], 0)"
    assert applied(gm, ExchangePayloads()).fired == {"ExchangePayloads": 1}
    assert text(gm) == [
        "view = view(x, [2, 100])",
        "constant_pad_nd = constant_pad_nd(view, [0, 28])",
        "encode = encode(constant_pad_nd, int8:128:bf16)",
        "all_to_all_single = all_to_all_single(encode, [130, 130], [130, 130], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "decode = decode(wait_tensor, 256, float32, int8:128:bf16)",
        "view_1 = view(decode, [2, 128])",
        "slice = slice.Tensor(view_1, 1, 0, 100)",
        "clone = clone(slice, memory_format=torch.contiguous_format)",
        "view_2 = view(clone, [4, 50])",
        "return view_2",
    ]
    assert applied(gm, ExchangePayloads()).count == 0


def test_uneven_parts_are_coded_one_by_one() -> None:
    gm = traced(uneven, value(0, 4, 50))
    assert InsertCodecs(INT8).run(gm).changed == 1
    rounded = [
        "split_with_sizes = split_with_sizes(x, [1, 3])",
        "getitem = getitem(split_with_sizes, 0)",
        "getitem_1 = getitem(split_with_sizes, 1)",
        "encode = encode(getitem, int8:128:bf16)",
    ]
    assert text(gm) == [
        *rounded,
        "decode = decode(encode, 50, float32, int8:128:bf16)",
        "view = view(decode, [1, 50])",
        "encode_1 = encode(getitem_1, int8:128:bf16)",
        "decode_1 = decode(encode_1, 150, float32, int8:128:bf16)",
        "view_1 = view(decode_1, [3, 50])",
        "cat = cat([view, view_1])",
        "all_to_all_single = all_to_all_single(cat, [2, 2], [1, 3], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "return wait_tensor",
    ]
    assert applied(gm, ExchangeParts()).fired == {"ExchangeParts": 1}
    assert text(gm) == [  # 50 and 100 elements fit one row of 130 bytes, 150 take two
        *rounded,
        "encode_1 = encode(getitem_1, int8:128:bf16)",
        "cat = cat([encode, encode_1])",
        "all_to_all_single = all_to_all_single(cat, [130, 130], [130, 260], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "split_with_sizes_1 = split_with_sizes(wait_tensor, [130, 130])",
        "getitem_2 = getitem(split_with_sizes_1, 0)",
        "getitem_3 = getitem(split_with_sizes_1, 1)",
        "decode = decode(getitem_2, 100, float32, int8:128:bf16)",
        "view = view(decode, [2, 50])",
        "decode_1 = decode(getitem_3, 100, float32, int8:128:bf16)",
        "view_1 = view(decode_1, [2, 50])",
        "cat_1 = cat([view, view_1])",
        "return cat_1",
    ]
    assert applied(gm, ExchangeParts()).count == 0


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
    assert InsertCodecs(Policy(form, "all_to_all", 0)).run(gm).changed == 1
    before = lockstep(gm, inputs)
    assert applied(gm, ExchangeRows(), ExchangePayloads()).count == 1
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))
    plain = lockstep(traced(lambda x: all_to_all(x, world), *inputs[0], world=world), inputs)
    assert not all(torch.equal(a, b) for a, b in zip(plain, before, strict=True))


def test_near_misses_are_declined() -> None:
    def reason(gm: torch.fx.GraphModule, rule: Rule) -> list[str]:
        done = applied(gm, rule)
        assert done.count == 0
        return [why for _, _, why in done.refused]

    x = value(0, 4, 50)
    never = "the values that are sent were not decoded from a payload"
    unpromised = "nothing promises that every rank codes each part by itself"
    assert reason(traced(lambda x: all_to_all(coded(x)), value(0, 4, 128)), ExchangePayloads()) == [unpromised]
    assert reason(traced(lambda x: uneven(coded(x)), x), ExchangePayloads()) == ["its parts are not equal"]
    short = "what its parts are made of fills no whole rows of 128 elements"
    assert reason(traced(lambda x: all_to_all(coded(x)), x), ExchangeRows()) == [short]
    # 128 elements for each rank, but of rows of 64: another rank may send one row and three.
    assert reason(traced(lambda x: all_to_all(coded(x)), value(0, 4, 64)), ExchangeRows()) == [short]
    assert reason(traced(uneven, x), ExchangeRows()) == [never]
    # Four rows of 64 of which 32 are kept: two rows of the payload, and no four payloads.
    kept = traced(lambda x: all_to_all(coded(x)[:, :32], 4), value(0, 4, 64), world=4)
    assert reason(kept, ExchangeRows()) == [never]

    def parts(x: Tensor, form: str = "int8:128:bf16") -> Tensor:
        one, three = x.split([1, 3])
        return uneven(torch.cat([coded(one), coded(three, form)]))

    assert reason(traced(parts, x), ExchangeParts()) == [unpromised]
    mixed = "its parts were not all decoded from payloads of one format"
    assert reason(traced(lambda x: parts(x, "bf16"), x), ExchangeParts()) == [mixed]
    assert reason(traced(lambda x: uneven(torch.cat([x, x])), value(0, 2, 50)), ExchangeParts()) == [mixed]
