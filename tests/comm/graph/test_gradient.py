"""Which sums of a backward graph get error feedback, as what, and which do without: with the reason in their record."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lockstep as send
from lockstep import lockstep, text, traced, value
from qpass.comm import Feedback, Policy
from qpass.comm.eager import schedule
from qpass.comm.graph.coded import CAST_FED, ENCODE, ENCODE_FED
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.graph.passes.expand_codecs import ExpandCodecs
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.policy.cost import FORMS
from qpass.comm.wire import partition

aten, c10d = torch.ops.aten, send.ops
X = value(0, 4, 50)


def fed(codec: str = "int8", **options: Any) -> Policy:
    return Policy(codec, tuple(FORMS), 0, feedback=Feedback(), **options)


def compressed(function: Callable[..., Any], *inputs: Tensor, backward: bool = True, world: int = 2) -> fx.GraphModule:
    return compress(traced(function, *inputs, world=world), fed(), backward=backward)


def states(gm: fx.GraphModule) -> list[str]:
    return [node.args[2] for node in gm.graph.find_nodes(op="call_function", target=ENCODE_FED)]


def test_a_gradient_is_encoded_with_its_residual() -> None:
    gm = traced(lambda x: (x + 1, send.reduce_scatter(x, "avg") / 3), X)
    InsertCodecs(fed(), backward=True).run(gm)
    assert text(gm)[1:6] == [
        "view = view(x, [2, 100])",
        "constant_pad_nd = constant_pad_nd(view, [0, 28])",
        "encode_fed = encode_fed(constant_pad_nd, int8:128:bf16, output_1)",
        "decode = decode(encode_fed, 256, float32, int8:128:bf16)",
        "view_1 = view(decode, [2, 128])",
    ]
    compress(gm, fed(), backward=True)
    assert text(gm)[3:5] == [
        "encode_fed = encode_fed(constant_pad_nd, int8:128:bf16, output_1)",
        "all_to_all_single = all_to_all_single(encode_fed, [130, 130], [130, 130], 0)",
    ]
    (record,) = collectives(gm)
    assert record.kernel == "all_to_all of int8:128:bf16 with error feedback, summed"
    assert record.reason == "800 -> 260 bytes"
    once = text(gm)
    assert text(compress(gm, fed(), backward=True)) == once


def test_both_roundings_of_a_sum_in_two_shots_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", 0)
    gm = compressed(send.all_reduce, value(0, 4, 100), world=3)
    assert text(gm) == [
        "encode_fed = encode_fed(x, int8:128:bf16, output_0)",
        "constant_pad_nd = constant_pad_nd(encode_fed, [0, 260])",
        "all_to_all_single = all_to_all_single(constant_pad_nd, [260, 260, 260], [260, 260, 260], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "view = view(wait_tensor, [3, 260])",
        "decode_reduce = decode_reduce(view, 256, float32, int8:128:bf16, 1)",
        "encode_fed_1 = encode_fed(decode_reduce, int8:128:bf16, output_0_sum)",
        "all_gather_into_tensor = all_gather_into_tensor(encode_fed_1, 3, 0)",
        "wait_tensor_1 = wait_tensor(all_gather_into_tensor)",
        "slice = slice.Tensor(wait_tensor_1, 0, 0, 520)",
        "decode = decode(slice, 400, float32, int8:128:bf16)",
        "view_1 = view(decode, [4, 100])",
        "return view_1",
    ]
    assert collectives(gm)[0].kernel == "all_to_all of int8:128:bf16 with error feedback, summed, all_gather"


def bucket(x: Tensor) -> Any:
    first, second = (send.all_reduce(torch.cat([x.flatten(), x.flatten()]) / 2)).split([200, 200])
    return x * 2, second.view(4, 50).to(torch.bfloat16), first.view(50, 4).t()


def coalesced(x: Tensor) -> Any:
    sums = c10d.all_reduce_coalesced([x, x + 1], "sum", "0")
    return [send.wait(each) for each in sums]


def into_an_input(x: Tensor, total: Tensor) -> Any:
    total.copy_(total + send.all_reduce(x))
    return x.sum()


def two_sums(x: Tensor) -> Tensor:
    return send.all_reduce(send.reduce_scatter(x))


KEPT: list[tuple[Callable[..., Any], tuple[Tensor, ...], list[str]]] = [
    (bucket, (X,), ["output_1"]),
    (coalesced, (X,), ["output_0"]),
    (into_an_input, (X, X), ["input_1"]),
    (two_sums, (X,), ["output_0", "output_0_1"]),
    (lambda x: send.all_reduce(x) + 2 * send.reduce_scatter(torch.cat([x, x])), (X,), ["output_0", "output_0_1"]),
    (lambda x: (send.all_reduce(x), send.all_reduce(x * 2), send.all_gather(x)), (X,), ["output_0", "output_1"]),
]


@pytest.mark.parametrize(("function", "inputs", "expected"), KEPT)
def test_what_leaves_with_its_elements_is_a_gradient(
    function: Callable[..., Any], inputs: tuple[Tensor, ...], expected: list[str]
) -> None:
    gm = compressed(function, *inputs)
    assert states(gm) == expected
    assert not any("no error feedback" in record.reason for record in collectives(gm))


MISSED: list[tuple[Callable[..., Any], dict[str, Any], str]] = [
    (send.all_reduce, {"backward": False}, "it is not a sum of a backward graph"),
    (lambda x: send.all_reduce(x) @ x.t(), {}, "its sum is read by mm"),
    (lambda x: (lambda y: (y, y.norm()))(send.all_reduce(x)), {}, "its sum is read by linalg_vector_norm"),
    (lambda x: send.all_reduce(x) * x, {}, "its sum is read by mul"),
    (lambda x: send.all_reduce(x).sum(0), {}, "its sum is read by sum_1"),
    (lambda x: send.all_reduce(send.all_reduce(x), "max"), {}, "its sum is read by all_reduce_1"),
    (
        lambda x: (x, send.all_reduce(x)), {"gradients": (0,)},
        "its sum leaves as output 1, which is not the gradient of a weight",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "options", "reason"), MISSED, ids=[case[2] for case in MISSED])
def test_what_is_no_gradient_does_without(function: Callable[..., Any], options: dict[str, Any], reason: str) -> None:
    gm = compress(traced(function, X), fed(), **{"backward": True} | options)
    assert not states(gm)
    assert collectives(gm)[0].outcome == "lowered"
    assert collectives(gm)[0].reason == f"800 -> 260 bytes; no error feedback: {reason}"
    plain = compress(traced(function, X), Policy("int8", tuple(FORMS), 0), **{"backward": True} | options)
    assert collectives(plain)[0].reason == "800 -> 260 bytes"
    assert text(plain) == text(gm)


def test_a_symbolic_size_does_without() -> None:
    gm = compress(traced(send.all_reduce, value(0, 40, 50), dynamic=True), fed(), backward=True)
    assert collectives(gm)[0].reason.endswith("bytes; no error feedback: its size is symbolic")


def test_an_override_keeps_the_feedback_and_a_plain_collective_has_none() -> None:
    policy = fed().override("int4", kind="reduce_scatter").keep_plain(kind="all_reduce")
    gm = compress(traced(lambda x: (send.all_reduce(x), send.reduce_scatter(x)), X), policy, backward=True)
    assert states(gm) == ["output_1"]
    assert [record.kernel for record in collectives(gm)] == [
        "", "all_to_all of int4:32:bf16 with error feedback, summed"
    ]  # fmt: skip


def test_compiled_graphs_send_it_in_pieces_and_never_write_it_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gm = compressed(send.all_reduce, X)
    assert ExpandCodecs().run(gm).changed == 1  # decode_reduce
    assert states(gm) == ["output_0"]
    monkeypatch.setattr(partition, "CHUNK", 128)
    split = traced(send.all_reduce, value(0, 10, 77))
    compress(split, fed(fuse=True), backward=True, inductor=True)
    assert text(split)[0] == "send_pieces = send_pieces(x, int8:128:bf16, 1, 4, 2, 0, output_0)"
    assert not split.graph.find_nodes(op="call_function", target=ENCODE)
    assert collectives(split)[0].kernel == "all_gather of int8:128:bf16 with error feedback, summed, in 4 pieces"


@pytest.mark.parametrize(
    ("function", "codec", "world"),
    [
        (send.all_reduce, "int8", 2), (lambda x: send.all_reduce(x, "avg"), "int4", 4), (send.all_reduce, "bf16", 3),
        (lambda x: send.reduce_scatter(x, "avg"), "int4:32:bf16:hadamard", 2),
        (lambda x: send.reduce_scatter(x, world=4), "int4", 4), (two_sums, "int4", 2),
    ],
)  # fmt: skip
@pytest.mark.parametrize("limit", [0, schedule.ONE_SHOT_BYTES])
def test_the_lowered_graph_is_the_one_with_plain_collectives_at_every_step(
    monkeypatch: pytest.MonkeyPatch, function: Callable[[Tensor], Tensor], codec: str, world: int, limit: int
) -> None:
    """Bit for bit over four steps, residuals too, sums in the order of ranks; one value of the second is infinite."""
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", limit)
    inputs = [[(value(9 * step + rank, 8, 77),) for rank in range(world)] for step in range(4)]
    inputs[1][1][0][5, 40] = torch.inf
    before, after = (traced(function, *inputs[0][0], world=world) for _ in range(2))
    InsertCodecs(fed(codec), backward=True).run(before)
    compress(after, fed(codec), backward=True)
    assert states(before) == states(after)
    feedbacks = [[Feedback() for _ in range(world)] for _ in range(2)]
    for step in inputs:
        results = [lockstep(gm, step, kept) for gm, kept in zip((before, after), feedbacks, strict=True)]
        for expected, found in zip(*results, strict=True):
            assert torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    for rank, (plain, lowered) in enumerate(zip(*feedbacks, strict=True)):
        whole = plain.state_dict()["rank 0"]["residuals"]
        for name, residual in lowered.state_dict()["rank 0"]["residuals"].items():
            expected = whole[name]
            if name.endswith("_sum"):  # of the rows that this rank owns, and zeros behind the last row of all
                expected = expected[rank * len(residual) : (rank + 1) * len(residual)]
                assert not residual[len(expected) :].any()
            assert torch.equal(residual[: len(expected)], expected)


@pytest.mark.parametrize(("world", "limit"), [(2, schedule.ONE_SHOT_BYTES), (4, 0)])
def test_a_narrow_sum_is_float32_up_to_its_last_cast(monkeypatch: pytest.MonkeyPatch, world: int, limit: int) -> None:
    """In one shot and in two: what all ranks apply and what they keep are the true sums of three steps."""
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", limit)
    inputs = [[(value(9 * step + rank, 8, 64).bfloat16(),) for rank in range(world)] for step in range(3)]
    gm = compress(traced(lambda x: send.all_reduce(x, "avg"), *inputs[0][0], world=world), fed("int4"), backward=True)
    assert [str(node.args[2]) for node in gm.graph.find_nodes(op="call_function", target=CAST_FED)] == ["output_0_cast"]
    assert collectives(gm)[0].reason.startswith("1,024 -> ")  # what it would have been in bfloat16
    feedbacks = [Feedback() for _ in range(world)]
    missing = torch.zeros(512, dtype=torch.float64)
    for step in inputs:
        (total, *others) = lockstep(gm, step, feedbacks)
        assert total.dtype == torch.bfloat16
        assert all(torch.equal(total, other) for other in others)
        missing += sum(x.double().flatten() for (x,) in step) / world - total.double().flatten()
    states = [feedback.state_dict()["rank 0"]["residuals"] for feedback in feedbacks]
    missing -= sum(state["0/output_0"].double() for state in states) / world + states[0]["0/output_0_cast"]
    if limit == 0:
        missing -= torch.cat([state["0/output_0_sum"] for state in states])[:512]
    assert missing.norm() < 1e-6 * 512**0.5  # of float32; the cast alone takes 1e-3


def test_parameters_alone_have_gradients_that_stay() -> None:
    def function(x: Tensor) -> Any:
        return send.all_reduce(x), send.all_reduce(2 * x)

    for gradients, expected in ((None, ["output_0", "output_1"]), ((1, 2), ["output_1"]), ((), [])):
        given: Collection[int] | None = gradients
        assert states(compress(traced(function, X), fed(), backward=True, gradients=given)) == expected
