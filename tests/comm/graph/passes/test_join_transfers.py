"""Small payloads that are sent together: which ones, as what, and what is left alone. Ranks of their own send them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.library import opcheck

import lockstep as send
from lockstep import lockstep, ops, text, traced, value
from qpass.comm import Policy
from qpass.comm.eager import schedule
from qpass.comm.graph.coded import ENCODE_FED, ENCODERS
from qpass.comm.graph.collective import KINDS, WAIT
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.graph.joined import CUT, JOIN
from qpass.comm.graph.passes import join_transfers
from qpass.comm.graph.passes.join_transfers import JoinTransfers
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.graph.passes.resolve_sizes import ResolveSizes
from qpass.comm.policy.cost import FORMS
from qpass.comm.wire.feedback import Feedback
from qpass.inspect.snapshot import snapshot

aten = torch.ops.aten
ALL = Policy("int8", tuple(FORMS), 0)
X, Y = value(0, 4, 64), value(1, 4, 100)  # 2 rows of 130 bytes, and 4; their halves are one row and two


def compressed(function: Callable[..., Any], *, world: int = 2, dynamic: bool = False) -> fx.GraphModule:
    """The function, compressed and not yet joined."""
    return compress(traced(function, X, Y, world=world, dynamic=dynamic), ALL)


def sent(gm: fx.GraphModule) -> list[str]:
    """The kinds of the graph's transfers, in its order."""
    return [KINDS[node.target] for node in gm.graph.nodes if node.target in KINDS]


def gathered(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a = send.all_gather(x * 2)
    return a + 1, send.all_gather(y.exp()), y.sin()


def scattered(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    return send.reduce_scatter(x), send.reduce_scatter(y, "avg")


def test_gathers_become_one_that_starts_and_is_waited_for_where_the_first_was() -> None:
    gm = compressed(gathered)
    assert JoinTransfers().run(gm).changed == 1
    gm.graph.lint()
    assert text(gm) == [
        "mul = mul.Tensor(x, 2)",
        "encode = encode(mul, int8:128:bf16)",
        "exp = exp(x_1)",
        "encode_1 = encode(exp, int8:128:bf16)",
        "join_payloads = join_payloads([encode, encode_1], 1)",
        "all_gather_into_tensor = all_gather_into_tensor(join_payloads, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "cut_payloads = cut_payloads(wait_tensor, 2, 0, 260)",
        "decode = decode(cut_payloads, 512, float32, int8:128:bf16)",
        "view = view(decode, [8, 64])",
        "add = add.Tensor(view, 1)",
        "cut_payloads_1 = cut_payloads(wait_tensor, 2, 260, 780)",
        "decode_1 = decode(cut_payloads_1, 1024, float32, int8:128:bf16)",
        "view_1 = view(decode_1, [2, 512])",
        "slice = slice.Tensor(view_1, 1, 0, 400)",
        "clone = clone(slice, memory_format=torch.contiguous_format)",
        "view_2 = view(clone, [8, 100])",
        "sin = sin(x_1)",
        "return [add, view_2, sin]",
    ]
    assert [(record.outcome, record.kernel, record.reason) for record in collectives(gm)] == [
        ("lowered", "all_gather of int8:128:bf16, joined with 1 other", "1,024 -> 260 bytes"),
        ("lowered", "all_gather of int8:128:bf16, joined with 1 other", "1,600 -> 520 bytes"),
    ]


def test_of_what_is_exchanged_the_parts_for_one_rank_stay_together() -> None:
    gm = compressed(scattered)
    assert JoinTransfers().run(gm).changed == 1
    lines = text(gm)
    start = lines.index("join_payloads = join_payloads([encode, encode_1], 2)")
    assert lines[start + 1 : start + 4] == [
        "all_to_all_single = all_to_all_single(join_payloads, [390, 390], [390, 390], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "cut_payloads = cut_payloads(wait_tensor, 2, 0, 130)",
    ]


@pytest.mark.parametrize("parts", [1, 4])
def test_what_was_joined_is_cut_apart_again(parts: int) -> None:
    payloads = [torch.arange(8, dtype=torch.uint8), torch.arange(100, 112, dtype=torch.uint8).view(4, 3)]
    joined, each = JOIN(payloads, parts), 8 // parts
    assert joined[each : each + 2].tolist() == [100, 101]
    assert torch.equal(CUT(joined, parts, 0, each), payloads[0])
    assert torch.equal(CUT(joined, parts, each, 20 // parts), payloads[1].flatten())
    opcheck(JOIN, (payloads, parts))
    opcheck(CUT, (joined, parts, 0, each))


def three(x: Tensor, y: Tensor, world: int) -> tuple[Tensor, ...]:
    """Three of each kind, started one after the other and waited for later."""
    xs = [x, y * 2, x.exp()]
    moved = [[ops.all_gather_into_tensor(each, world, "0") for each in xs]]
    moved += [[ops.all_reduce(each, "sum", "0") for each in xs], [ops.broadcast(each, 1, "0") for each in xs]]
    moved += [[ops.reduce_scatter_tensor(each, "avg", world, "0") for each in xs]]
    return tuple(send.wait(issue) for issues in moved for issue in reversed(issues))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("two_shot", [False, True])
def test_the_bits_are_those_of_what_was_sent_apart(world: int, two_shot: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", 0 if two_shot else 1 << 15)
    inputs = [(value(rank, 4, 64), value(rank + 5, 4, 100)) for rank in range(world)]
    gm = compressed(lambda x, y: three(x, y, world), world=world)
    before, bytes_before, told = lockstep(gm, inputs), snapshot(gm).sent_bytes, len(collectives(gm))
    count = len(sent(gm))
    assert count == (15 if two_shot and world > 2 else 12)
    buckets = JoinTransfers().run(gm).changed
    gm.graph.lint()
    assert len(sent(gm)) == buckets == (4 if count == 15 else 3)  # sums in one shot are gathers
    assert snapshot(gm).sent_bytes == bytes_before
    assert len(collectives(gm)) == told == 12
    assert {record.kernel.rpartition(", ")[2] for record in collectives(gm)} <= {
        "joined with 2 others", "joined with 5 others"
    }  # fmt: skip
    for found, expected in zip(lockstep(gm, inputs), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert JoinTransfers().run(gm).changed == 0
    once = text(gm)
    assert text(compress(gm, ALL)) == once


def test_codecs_that_are_written_out_are_joined_too() -> None:
    inputs = [(value(rank, 4, 64), value(rank + 5, 4, 100)) for rank in range(2)]
    apart, joined = (
        compress(traced(gathered, X, Y), Policy("int8", min_bytes=0, fuse=True, join=join), inductor=True)
        for join in (False, True)
    )
    assert (len(sent(apart)), len(sent(joined))) == (2, 1)
    for found, expected in zip(lockstep(joined, inputs), lockstep(apart, inputs), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_bucket_is_full_at_some_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        return tuple(send.all_gather(each) for each in (x, torch.cat([x, y, y], 1), y, x + 1, y + 1))

    gm = compressed(function)  # 260, 1170, 520, 260 and 520 bytes
    monkeypatch.setattr(join_transfers, "LARGEST", 1040)
    assert JoinTransfers().run(gm).changed == 1
    sizes = [node.args[0].meta["val"].numel() for node in gm.graph.nodes if node.target in KINDS]
    assert sizes == [260 + 520 + 260, 1170, 520]


def test_what_was_received_together_is_sent_on_together() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        twice = [send.all_gather(send.all_gather(each.abs())) for each in (x, y)]
        return tuple(torch.ops.prims.convert_element_type(each, torch.uint8) for each in twice)

    inputs = [(value(rank, 4, 64), value(rank + 5, 4, 100)) for rank in range(2)]
    gm = traced(function, X, Y)
    for _ in range(2):  # the cast moves over both
        assert LowerCollectives().run(gm).changed == 2
    before = lockstep(gm, inputs)
    assert sum(node.args[0].target is WAIT for node in gm.graph.nodes if node.target in KINDS) == 2
    assert JoinTransfers().run(gm).changed == 2
    gm.graph.lint()
    assert sent(gm) == ["all_gather"] * 2
    for found, expected in zip(lockstep(gm, inputs), before, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_moves_is_what_the_others_are_computed_from() -> None:
    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        a = send.all_gather(x)
        b = a.exp()
        c = y.sin()
        d = y.cos()
        return b, c, send.all_gather(d * 2)

    gm = compressed(function)
    assert JoinTransfers().run(gm).changed == 1
    order = [line.split(" = ")[0] for line in text(gm)]
    assert [name for name in order if name in ("cos", "mul", "all_gather_into_tensor", "exp", "sin")] == [
        "cos", "mul", "all_gather_into_tensor", "exp", "sin"
    ]  # fmt: skip


def one_after_the_other(x: Tensor, y: Tensor) -> Tensor:
    return send.all_gather(send.all_gather(x))


def crossed(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Of the two in either group the one waits for one in the other: joined, they would wait for one another."""
    a, b = send.all_gather(x), send.wait(ops.all_gather_into_tensor(y, 2, "1"))
    return send.all_gather(b), send.wait(ops.all_gather_into_tensor(a, 2, "1"))


def written_between(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    a = send.all_gather(x)
    torch.ops.aten.copy_.default(y, a[:4, :1].expand(4, 100))
    return a, send.all_gather(y)


def read_beside_its_wait(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    largest = ops.all_reduce(y, "max", "0")
    a = send.all_gather(send.all_reduce(x, "max"))
    send.wait(largest)
    return a, send.all_gather(largest * 2)


ALONE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "one needs the other": one_after_the_other,
    "they would wait for one another": crossed,
    "other groups": lambda x, y: (send.all_gather(x), send.wait(ops.all_gather_into_tensor(y, 2, "1"))),
    "other kinds": lambda x, y: (send.all_gather(x), send.reduce_scatter(y)),
    "other sources": lambda x, y: (send.broadcast(x, 0), send.broadcast(y, 1)),
    "parts that may be unequal elsewhere": lambda x, y: (send.all_to_all(x), send.all_to_all(y)),
    "values that nobody coded": lambda x, y: (send.all_gather(x.byte()), send.all_gather(y.byte())),
    "sent in full": lambda x, y: (send.all_reduce(x, "max"), send.all_reduce(y, "max")),
    "a write between": written_between,
    "a wait between that nothing says is needed": read_beside_its_wait,
    "random numbers between": lambda x, y: (send.all_gather(x), send.all_gather(aten.rand_like(y))),
}


@pytest.mark.parametrize("why", ALONE)
def test_what_is_left_alone(why: str) -> None:
    gm = compressed(ALONE[why])
    before = text(gm)
    assert len(sent(gm)) > 1
    assert JoinTransfers().run(gm).changed == 0
    assert text(gm) == before


def test_large_payloads_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(join_transfers, "LARGEST", 260 + 520 - 1)
    assert JoinTransfers().run(compressed(gathered)).changed == 0


def test_symbolic_sizes_become_nodes() -> None:
    gm = compressed(scattered, dynamic=True)
    ResolveSizes().run(gm)
    assert JoinTransfers().run(gm).changed == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    lines = text(gm)
    start = lines.index("join_payloads = join_payloads([encode, encode_1], 2)")
    assert lines[start + 1 : start + 10] == [
        "sym_size_6 = sym_size.int(encode, 0)",
        "floordiv_9 = floordiv(sym_size_6, 2)",
        "sym_size_7 = sym_size.int(encode_1, 0)",
        "floordiv_10 = floordiv(sym_size_7, 2)",
        "add_6 = add(floordiv_9, floordiv_10)",
        "all_to_all_single = all_to_all_single(join_payloads, [add_6, add_6], [add_6, add_6], 0)",
        "wait_tensor = wait_tensor(all_to_all_single)",
        "cut_payloads = cut_payloads(wait_tensor, 2, 0, floordiv_9)",
        "floordiv_11 = floordiv(sym_size_2, 2)",
    ]
    assert any(line.startswith("cut_payloads_1 = cut_payloads(wait_tensor, 2, floordiv_9, add_6)") for line in lines)
    ResolveSizes().run(gm)
    assert JoinTransfers().run(gm).changed == 0


def test_sums_with_error_feedback_are_joined() -> None:
    policy = Policy("int8", min_bytes=0, feedback=Feedback())
    gm = compress(traced(lambda x, y: (send.all_reduce(x), send.all_reduce(y)), X, Y), policy, backward=True)
    assert [node.target for node in gm.graph.nodes if node.target in ENCODERS] == [ENCODE_FED] * 2
    assert JoinTransfers().run(gm).changed == 1
    assert sent(gm) == ["all_gather"]


def test_only_a_compiled_graph_is_joined_and_only_where_policy_and_inductor_leave_it_to_us() -> None:
    def count(comm: Policy = ALL, **options: Any) -> int:
        return len(sent(compress(traced(gathered, X, Y), comm, **options)))

    assert count() == 2
    assert count(inductor=True) == 1
    assert count(Policy("int8", tuple(FORMS), 0, join=False), inductor=True) == 2
    with torch._inductor.config.patch(bucket_all_gathers_fx="all"):
        assert count(inductor=True) == 2
