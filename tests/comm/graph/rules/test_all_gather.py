from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from lockstep import all_gather, applied, coded, lockstep, text, traced, value, wait
from qpass.comm.graph.collective import KINDS, ops
from qpass.comm.graph.rules.all_gather import CastBeforeGather, GatherPayloads
from qpass.ir.record import record_of

PRIMS = torch.ops.prims


def test_payloads_are_gathered_instead_of_values() -> None:
    gm = traced(lambda x: all_gather(coded(x)) * 2, value(0, 4, 64))
    assert text(gm) == [
        "encode = encode(x, int8:128:bf16)",
        "decode = decode(encode, 256, float32, int8:128:bf16)",
        "view = view(decode, [4, 64])",
        "all_gather_into_tensor = all_gather_into_tensor(view, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "mul = mul.Tensor(wait_tensor, 2)",
        "return mul",
    ]
    assert applied(gm, GatherPayloads()).fired == {"GatherPayloads": 1}
    assert text(gm) == [
        "encode = encode(x, int8:128:bf16)",
        "all_gather_into_tensor = all_gather_into_tensor(encode, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "decode = decode(wait_tensor, 512, float32, int8:128:bf16)",
        "view = view(decode, [8, 64])",
        "mul = mul.Tensor(view, 2)",
        "return mul",
    ]
    assert applied(gm, GatherPayloads()).count == 0


def test_the_record_tells_what_went_instead_of_what() -> None:
    gm = traced(lambda x: all_gather(coded(x)), value(0, 4, 64))
    applied(gm, GatherPayloads())
    (record,) = (record_of(node) for node in gm.graph.nodes if node.target in KINDS)
    assert record is not None
    assert (record.op, record.outcome, record.kernel) == ("all_gather", "lowered", "all_gather of int8:128:bf16")
    assert record.reason == "1,024 -> 260 bytes"  # 256 float32; 2 rows of 128 codes and a scale of 2 bytes


@pytest.mark.parametrize(
    ("form", "dtype", "world"),
    [
        ("int8:128:bf16", torch.float32, 2), ("int8:128:bf16", torch.bfloat16, 4), ("bf16", torch.float32, 3),
        ("int4:32:bf16:hadamard", torch.float64, 2), ("fp8_e4m3:32:e8m0", torch.float16, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(1,), (4, 64), (2, 3, 43)])
def test_bit_for_bit(shape: tuple[int, ...], form: str, dtype: torch.dtype, world: int) -> None:
    inputs = [(value(rank, *shape, dtype=dtype),) for rank in range(world)]
    gm = traced(lambda x: all_gather(coded(x, form), world), *inputs[0], world=world)
    before = lockstep(gm, inputs)
    assert applied(gm, GatherPayloads()).count == 1
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))


def test_issue_and_wait_stay_where_they_were() -> None:
    def overlapped(x: Tensor) -> tuple[Tensor, Tensor]:
        issued = ops.all_gather_into_tensor(coded(x), 2, "0")
        between = x.exp()
        return wait(issued), between

    gm = traced(overlapped, value(0, 4, 64))
    applied(gm, GatherPayloads())
    order = [line.split(" = ")[0] for line in text(gm)]
    assert order[:4] == ["encode", "all_gather_into_tensor", "exp", "wait_tensor"]


def refusals(function: Callable[[Tensor], Tensor], x: Tensor, rule: GatherPayloads | CastBeforeGather) -> list[str]:
    done = applied(traced(function, x), rule)
    assert done.count == 0
    return [reason for _, _, reason in done.refused]


def test_near_misses_of_payloads_are_declined() -> None:
    x = value(0, 4, 50)

    def of_two(x: Tensor) -> Tensor:
        payload = torch.ops.qpass.encode(torch.nn.functional.pad(x.view(2, 100), (0, 28)), "int8:128:bf16")
        values = torch.ops.qpass.decode(payload, 256, torch.float32, "int8:128:bf16").view(2, 128)
        return values[:, :100].contiguous().view(4, 50)

    assert refusals(all_gather, x, GatherPayloads()) == ["the values that are sent were not decoded from a payload"]
    assert refusals(lambda x: all_gather(coded(x) + 1), x, GatherPayloads()) == [
        "the values that are sent were not decoded from a payload"
    ]
    assert refusals(lambda x: all_gather(of_two(x)), x, GatherPayloads()) == [
        "the payload does not come apart into 1 payloads"
    ]


def cast(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: PRIMS.convert_element_type(all_gather(x), dtype)


def sent(gm: fx.GraphModule) -> list[torch.dtype]:
    return [node.args[0].meta["val"].dtype for node in gm.graph.nodes if node.target in KINDS]


def test_a_cast_moves_before_the_gather() -> None:
    gm = traced(cast(torch.float8_e4m3fn), value(0, 4, 8))
    assert text(gm)[2] == "convert_element_type = prims.convert_element_type(wait_tensor, float8_e4m3fn)"
    assert applied(gm, CastBeforeGather()).fired == {"CastBeforeGather": 1}
    assert text(gm) == [
        "convert_element_type = prims.convert_element_type(x, float8_e4m3fn)",
        "view = view.dtype(convert_element_type, uint8)",
        "all_gather_into_tensor = all_gather_into_tensor(view, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "view_1 = view.dtype(wait_tensor, float8_e4m3fn)",
        "return view_1",
    ]
    assert applied(gm, CastBeforeGather()).count == 0


@pytest.mark.parametrize(
    ("dtype", "travels"),
    [
        (torch.float8_e4m3fn, torch.uint8), (torch.float8_e5m2, torch.uint8), (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16), (torch.int8, torch.int8),
    ],
)  # fmt: skip
def test_a_moved_cast_gives_the_same_bits(dtype: torch.dtype, travels: torch.dtype) -> None:
    inputs = [(value(rank, 4, 8),) for rank in range(2)]
    gm = traced(cast(dtype), *inputs[0])
    before = lockstep(gm, inputs)
    applied(gm, CastBeforeGather())
    assert sent(gm) == [travels]
    for a, b in zip(lockstep(gm, inputs), before, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def test_near_misses_of_casts_are_declined() -> None:
    x = value(0, 4, 8)
    assert refusals(cast(torch.float64), x, CastBeforeGather()) == ["float64 is not narrower than float32"]
    assert refusals(cast(torch.int16), x, CastBeforeGather()) == ["int16 does not travel"]
    assert refusals(cast(torch.int8), x.to(torch.int32), CastBeforeGather()) == ["what is gathered is int32"]
    both = traced(lambda x: (lambda y: (cast(torch.int8)(x), y + 1))(all_gather(x)), x)
    assert applied(both, CastBeforeGather()).count == 1  # two gathers, of which one is cast
    shared = traced(lambda x: (lambda y: PRIMS.convert_element_type(y, torch.int8) + y)(all_gather(x)), x)
    assert applied(shared, CastBeforeGather()).count == 0  # the wide values are needed, too
