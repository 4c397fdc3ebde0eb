from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lockstep as send
from lockstep import coded, lockstep, text, traced, value
from qpass.comm.graph.collective import KINDS, WORLD_KEY, is_other_collective
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.policy.cost import FORMS, Link
from qpass.comm.policy.policy import Policy
from qpass.ir.record import NodeRecord, record_of

ALL = Policy("int8", tuple(FORMS), 0)
ROUND = ["encode = encode(x, int8:128:bf16)", "decode = decode(encode, 200, float32, int8:128:bf16)"]


def inserted(gm: fx.GraphModule, policy: Policy = ALL) -> NodeRecord:
    """The decision about the one collective of ``gm``; a second run of the pass changes nothing."""
    step = InsertCodecs(policy)
    count = step.run(gm).changed
    gm.graph.lint()
    once = text(gm)
    assert step.run(gm).changed == 0
    assert text(gm) == once
    (node,) = (node for node in gm.graph.nodes if node.target in KINDS or is_other_collective(node))
    record = record_of(node)
    assert record is not None
    assert count == (record.outcome == "quantized")
    return record


def test_what_is_sent_is_rounded_first() -> None:
    gm = traced(lambda x: send.all_gather(x) + 1, value(0, 4, 50))
    record = inserted(gm)
    assert (record.op, record.outcome, record.kernel) == ("all_gather", "quantized", "int8:128:bf16")
    assert record.asked
    assert (record.module, record.line) == ("block", "model.py:7: y = send(x)")
    assert text(gm) == [
        *ROUND,
        "view = view(decode, [4, 50])",
        "all_gather_into_tensor = all_gather_into_tensor(view, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "add = add.Tensor(wait_tensor, 1)",
        "return add",
    ]


def test_parts_start_on_rows_of_the_payload() -> None:
    gm = traced(send.all_to_all, value(0, 4, 50))
    inserted(gm)
    assert text(gm)[:8] == [
        "view = view(x, [2, 100])",
        "constant_pad_nd = constant_pad_nd(view, [0, 28])",
        "encode = encode(constant_pad_nd, int8:128:bf16)",
        "decode = decode(encode, 256, float32, int8:128:bf16)",
        "view_1 = view(decode, [2, 128])",
        "slice = slice.Tensor(view_1, 1, 0, 100)",
        "clone = clone(slice, memory_format=torch.contiguous_format)",
        "view_2 = view(clone, [4, 50])",
    ]


def test_a_large_sum_over_many_ranks_is_rounded_too() -> None:
    big, small = value(0, 1 << 16), value(0, 200)
    for x, world, roundings in ((small, 4, 1), (big, 2, 1), (big, 4, 2)):  # payloads up to 32 KiB go in one shot
        gm = traced(send.all_reduce, x, world=world)
        inserted(gm)
        assert "\n".join(text(gm)).count("= encode(") == roundings


@pytest.mark.parametrize("kind", ["all_gather", "all_reduce", "all_to_all", "broadcast", "reduce_scatter"])
def test_the_graph_computes_what_rounding_by_hand_computes(kind: str) -> None:
    """Parts of 128 elements, which are rows of the payload, so that rounding the whole is rounding the parts."""
    function = getattr(send, kind)
    inputs = [(value(rank, 4, 64),) for rank in range(2)]
    gm, plain = traced(function, *inputs[0]), traced(function, *inputs[0])
    inserted(gm)
    rounded = lockstep(plain, [(coded(x),) for (x,) in inputs])
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), rounded, strict=True))
    assert not torch.equal(rounded[0], lockstep(plain, inputs)[0])


def test_inputs_of_any_strides_are_sent_in_their_order() -> None:
    inputs = [(value(rank, 50, 4),) for rank in range(2)]
    gm = traced(lambda x: send.all_to_all(x.t()), *inputs[0])
    inserted(gm)
    plain = lockstep(traced(lambda x: send.all_to_all(x.t()), *inputs[0]), inputs)
    for a, b in zip(lockstep(gm, inputs), plain, strict=True):
        assert (a - b).abs().max() <= 0.5 * 1.01 / 127 * max(x.abs().max() for (x,) in inputs)  # half a step


X = torch.ones(4, 50)
DECLINED: list[tuple[Callable[[Tensor], Any], Tensor, Policy, str, bool]] = [
    (send.all_reduce, X.long(), ALL, "values of int64 travel as they are", False),
    (send.all_reduce, X > 0, ALL, "values of bool travel as they are", False),
    (send.all_reduce, X.to(torch.complex64), ALL, "values of complex64 travel as they are", False),
    (lambda x: send.all_reduce(x, "max"), X, ALL, "a max cannot be taken over payloads", True),
    (lambda x: send.reduce_scatter(x, "product"), X, ALL, "a product cannot be taken over payloads", True),
    (
        lambda x: send.ops.all_reduce(x, "sum", "0"), X, ALL,
        "its result is read without being waited for, or more than once", True,
    ),
    (send.all_reduce, X, Policy("int8"), "800 bytes are fewer than the policy's min_bytes of 65,536", False),
    (
        send.all_to_all, X, Policy("int8", min_bytes=0),
        "the policy names all_reduce, reduce_scatter, all_gather, broadcast only", False,
    ),
    (send.all_gather, X, Policy("int8", kinds=("all_reduce",)), "the policy names all_reduce only", False),
    (
        send.all_reduce, X.bfloat16(), Policy("bf16", min_bytes=0),
        "all_reduce is sent plain: bf16 sends 2.00 bytes an element, no fewer than the 2 of bfloat16", False,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "x", "policy", "reason", "asked"), DECLINED, ids=[case[3] for case in DECLINED])
def test_what_is_declined_says_why(
    function: Callable[[Tensor], Any], x: Tensor, policy: Policy, reason: str, asked: bool
) -> None:
    gm = traced(function, x)
    before = text(gm)
    record = inserted(gm, policy)
    assert (record.outcome, record.reason, record.asked) == ("float", reason, asked)
    assert text(gm) == before


def test_an_unknown_group_is_declined() -> None:
    gm = traced(send.all_reduce, X)
    for node in gm.graph.nodes:
        del node.meta[WORLD_KEY]
    assert inserted(gm).reason == "the number of ranks in its group is not known"


def test_a_measured_link_decides_and_says_its_numbers() -> None:
    slow, fast = Link(1e6, 1e-4, 1e9, 1e9), Link(1e12, 1e-4, 1e9, 1e9)
    assert inserted(traced(send.all_reduce, value(0, 9999)), Policy("int8", min_bytes=0, link=slow)).kernel
    record = inserted(traced(send.all_reduce, value(0, 9999)), Policy("int8", min_bytes=0, link=fast))
    assert record.reason.startswith("all_reduce of 9,999 float32 over 2 ranks is sent plain: ")
    assert "compressed" in record.reason


HEAD = Policy("int8", min_bytes=0)
OVERRIDES = [  # of an all_gather of 1,600 bytes in module block, group "0"
    (HEAD.override("int4", module="bl*"), False, "int4:32:bf16"),
    (HEAD.override("int4", module="head"), False, "int8:128:bf16"),
    (HEAD.override("int4", group="0"), False, "int4:32:bf16"),
    (HEAD.override("int4", group="1"), False, "int8:128:bf16"),
    (HEAD.override("int4", backward=True), True, "int4:32:bf16"),
    (HEAD.override("int4", backward=True), False, "int8:128:bf16"),
    (HEAD.override("int4", min_bytes=1600), False, "int4:32:bf16"),
    (HEAD.override("int4", min_bytes=1601), False, "int8:128:bf16"),
    (HEAD.override("int4", kind="all_gather", module="head").override("bf16", kind="all_gather"), False, "bf16"),
    (Policy("int8", kinds=()).override("int4", kind="all_gather", min_bytes=0), False, "int4:32:bf16"),
    (Policy("int8").override("int4", kind="all_gather"), False, ""),  # from the policy's min_bytes on
    (HEAD.keep_plain(module="block"), False, ""),
    (HEAD.keep_plain(module="head", kind="all_gather"), False, "int8:128:bf16"),
]


@pytest.mark.parametrize(("policy", "backward", "kernel"), OVERRIDES, ids=str)
def test_overrides_pick_out_collectives(policy: Policy, backward: bool, kernel: str) -> None:
    gm = traced(send.all_gather, value(0, 4, 50))
    InsertCodecs(policy, backward).run(gm)
    (record,) = (record for node in gm.graph.nodes if (record := record_of(node)) is not None)
    assert (record.kernel, record.group) == (kernel, "0")


def test_an_override_that_keeps_something_plain_is_the_reason() -> None:
    record = inserted(traced(send.all_gather, value(0, 4, 50)), HEAD.keep_plain(module="block"))
    assert record.reason == "override 0 of the policy (module='block') leaves it plain"
    assert not record.asked


def test_values_that_somebody_rounded_are_left_to_the_rules() -> None:
    gm = traced(lambda x: send.all_gather(coded(x, "int4:32:bf16")), X)
    before = text(gm)
    assert InsertCodecs(ALL).run(gm).changed == 0
    assert text(gm) == before
