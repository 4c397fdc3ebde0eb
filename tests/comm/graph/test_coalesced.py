from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lockstep as send
from lockstep import lockstep, ops, text, traced, value
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.policy.policy import Policy

ALL = Policy("int8", min_bytes=0)


def summed(x: Tensor, y: Tensor, op: str = "sum") -> tuple[Tensor, ...]:
    a, b = ops.all_reduce_coalesced([x, y], op, "0")
    return send.wait(a) * 2, send.wait(b)


def gathered(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b = ops.all_gather_into_tensor_coalesced([x, y], 2, "0")
    return send.wait(a), send.wait(b)


def scattered(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a, b = ops.reduce_scatter_tensor_coalesced([x, y], "avg", 2, "0")
    return send.wait(b), send.wait(a)


def test_a_list_is_sent_as_one_tensor() -> None:
    gm = traced(summed, value(0, 4, 50), value(0, 128))
    assert [line for line in text(gm) if "coalesced" in line] == [
        "all_reduce_coalesced = all_reduce_coalesced([x, x_1], sum, 0)",
        "getitem = getitem(all_reduce_coalesced, 0)",
        "getitem_1 = getitem(all_reduce_coalesced, 1)",
    ]
    compress(gm, ALL)
    assert text(gm) == [
        "reshape = reshape(x, [1, 200])",
        "constant_pad_nd = constant_pad_nd(reshape, [0, 56])",
        "reshape_1 = reshape(x_1, [1, 128])",
        "cat = cat([constant_pad_nd, reshape_1], 1)",
        "reshape_2 = reshape(cat, [-1])",
        "encode = encode(reshape_2, int8:128:bf16)",
        "all_gather_into_tensor = all_gather_into_tensor(encode, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "view = view(wait_tensor, [2, 390])",
        "decode_reduce = decode_reduce(view, 384, float32, int8:128:bf16, 1)",
        "reshape_3 = reshape(decode_reduce, [1, -1])",
        "slice = slice.Tensor(reshape_3, 1, 0, 200)",
        "reshape_4 = reshape(slice, [4, 50])",
        "mul = mul.Tensor(reshape_4, 2)",
        "slice_1 = slice.Tensor(reshape_3, 1, 256, 384)",
        "reshape_5 = reshape(slice_1, [128])",
        "return [mul, reshape_5]",
    ]
    (record,) = collectives(gm)
    assert (record.op, record.reason) == ("all_reduce", "1,312 -> 390 bytes")  # of 328 elements, none of them padding
    once = text(gm)
    compress(gm, ALL)
    assert text(gm) == once


def summed_in_place(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    xs = [x * 1, y * 1]
    ops.all_reduce_coalesced_(xs, "sum", "0")
    for each in xs:
        send.wait(each)
    return xs[0] * 2, xs[1] * 1


def test_what_is_written_in_place_is_copied_there() -> None:
    gm = compress(traced(summed_in_place, value(0, 4, 50), value(0, 128)), ALL)
    lines = text(gm)
    assert lines[lines.index("reshape_3 = reshape(decode_reduce, [1, -1])") :] == [
        "reshape_3 = reshape(decode_reduce, [1, -1])",
        "slice = slice.Tensor(reshape_3, 1, 0, 200)",
        "reshape_4 = reshape(slice, [4, 50])",
        "copy_ = copy_(mul, reshape_4)",
        "slice_1 = slice.Tensor(reshape_3, 1, 256, 384)",
        "reshape_5 = reshape(slice_1, [128])",
        "copy__1 = copy_(mul_1, reshape_5)",
        "mul_2 = mul.Tensor(reshape_4, 2)",
        "mul_3 = mul.Tensor(reshape_5, 1)",
        "return [mul_2, mul_3]",
    ]


def alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same results from one collective for each tensor."""
    kinds = {
        summed: lambda x, y: (send.all_reduce(x) * 2, send.all_reduce(y)),
        summed_in_place: lambda x, y: (send.all_reduce(x) * 2, send.all_reduce(y)),
        gathered: lambda x, y: (send.all_gather(x), send.all_gather(y)),
        scattered: lambda x, y: (send.reduce_scatter(y, "avg"), send.reduce_scatter(x, "avg")),
    }
    return kinds[function]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("form", ["int8", "int4:32:bf16:hadamard", "bf16"])
@pytest.mark.parametrize("function", [summed, summed_in_place, gathered, scattered])
def test_bit_for_bit_as_each_tensor_alone(function: Callable[..., Any], form: str, dynamic: bool) -> None:
    inputs = [(value(rank, 4, 50), value(rank + 5, 6, 3, 30)) for rank in range(2)]
    policy = Policy(form, min_bytes=0)
    gm = traced(function, *inputs[0], dynamic=dynamic)
    plain = lockstep(gm, inputs)
    assert InsertCodecs(policy).run(gm).changed == 1
    assert InsertCodecs(policy).run(gm).changed == 0
    gm.graph.lint()
    before = lockstep(gm, inputs)
    assert LowerCollectives().run(gm).changed == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    after = lockstep(gm, inputs)
    separate = lockstep(compress(traced(alone(function), *inputs[0], dynamic=dynamic), policy), inputs)
    for rank in range(2):
        for a, b, c, exact in zip(after[rank], before[rank], separate[rank], plain[rank], strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)
            assert a.shape == exact.shape
            assert not torch.equal(a, exact)


def test_transfers_start_and_are_waited_for_where_they_were() -> None:
    def overlapped(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a, b = ops.all_gather_into_tensor_coalesced([x, y], 2, "0")
        between = x.exp()
        return send.wait(a), y.sin(), send.wait(b), between

    gm = compress(traced(overlapped, value(0, 4, 50), value(0, 128)), ALL)
    order = [line.split(" = ")[0] for line in text(gm)]
    started, between, waited = (order.index(name) for name in ("all_gather_into_tensor", "exp", "wait_tensor"))
    assert started < between < waited < order.index("sin")


X, Y = torch.ones(4, 50), torch.ones(128)
DECLINED: list[tuple[Callable[..., Any], Tensor, Policy, str, bool]] = [
    (summed, Y.long(), ALL, "its tensors are of float32 and int64", True),
    (summed, Y.bfloat16(), ALL, "its tensors are of bfloat16 and float32", True),
    (lambda x, y: summed(x.long(), y), Y.long(), ALL, "values of int64 travel as they are", False),
    (lambda x, y: summed(x, y, "max"), Y, ALL, "a max cannot be taken over payloads", True),
    (
        lambda x, y: ops.all_reduce_coalesced([x, y], "sum", "0"), Y, ALL,
        "its result is read without being waited for, or more than once", True,
    ),
    (
        lambda x, y: send.wait(ops.all_reduce_coalesced_([x * 1, y * 1], "sum", "0")[0]), Y, ALL,  # the other is not
        "its result is read without being waited for, or more than once", True,
    ),
    (summed, Y, Policy("int8"), "1,312 bytes are fewer than the policy's min_bytes of 65,536", False),
    (summed, Y, Policy("int8", "all_gather", 0), "the policy names all_gather only", False),
]  # fmt: skip


@pytest.mark.parametrize(("function", "y", "policy", "reason", "asked"), DECLINED, ids=[case[3] for case in DECLINED])
def test_what_is_declined_says_why(
    function: Callable[..., Any], y: Tensor, policy: Policy, reason: str, asked: bool
) -> None:
    gm = traced(function, X, y)
    before = text(gm)
    assert InsertCodecs(policy).run(gm).changed == 0
    (record,) = collectives(gm)
    assert (record.outcome, record.reason, record.asked) == ("float", reason, asked)
    assert text(gm) == before
