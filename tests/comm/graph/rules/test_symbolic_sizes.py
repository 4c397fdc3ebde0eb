"""Collectives of tensors whose sizes are not known when the graph is compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lockstep as send
from lockstep import lockstep, text, traced, value
from qpass.comm.eager import schedule
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.policy.cost import FORMS, Link
from qpass.comm.policy.policy import Policy

ALL = Policy("int8", tuple(FORMS), 0)
SHAPES = ((4, 50), (6, 70), (8, 128), (64, 3))


def guards(gm: fx.GraphModule) -> list[str]:
    (x, *_) = gm.graph.find_nodes(op="placeholder")
    return [str(guard.expr) for guard in x.meta["val"].fake_mode.shape_env.guards]


def test_sizes_become_nodes() -> None:
    gm = traced(send.all_gather, value(0, 4, 50), dynamic=True)
    assert InsertCodecs(ALL).run(gm).changed == 1
    assert [line for line in text(gm) if "= sym_size." not in line] == [
        "encode = encode(x, int8:128:bf16)",
        "mul = mul(sym_size, sym_size_1)",
        "decode = decode(encode, mul, float32, int8:128:bf16)",
        "view = view(decode, [sym_size, sym_size_1])",
        "all_gather_into_tensor = all_gather_into_tensor(view, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "return wait_tensor",
    ]
    assert LowerCollectives().run(gm).changed == 1
    gm.graph.eliminate_dead_code()
    assert [line for line in text(gm) if "= sym_size." not in line] == [
        "encode = encode(x, int8:128:bf16)",
        "all_gather_into_tensor = all_gather_into_tensor(encode, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "mul = mul(sym_size, 2)",
        "mul_1 = mul(mul, sym_size_1)",
        "floordiv = floordiv(mul_1, 2)",
        "add = add(floordiv, 127)",
        "floordiv_1 = floordiv(add, 128)",
        "mul_2 = mul(floordiv_1, 128)",
        "mul_3 = mul(mul_2, 2)",
        "decode = decode(wait_tensor, mul_3, float32, int8:128:bf16)",
        "view = view(decode, [2, mul_2])",
        "slice = slice.Tensor(view, 1, 0, floordiv)",
        "clone = clone(slice, memory_format=torch.contiguous_format)",
        "view_1 = view(clone, [mul, sym_size_1])",
        "return view_1",
    ]
    (record,) = collectives(gm)
    rows = "((s17*s94 + 127)//128)"
    names = sorted({name for name in record.reason.replace("*", " ").replace("(", " ").split() if name[0] == "s"})
    assert record.reason.replace(names[0], "s17").replace(names[1], "s94") == f"4*s17*s94 -> 130*({rows}) bytes"


def even(x: Tensor, world: int) -> Tensor:
    return send.wait(send.ops.all_to_all_single(x, [x.shape[0] // world] * world, [x.shape[0] // world] * world, "0"))


KINDS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "all_gather": send.all_gather,
    "all_reduce": lambda x, world: send.all_reduce(x),
    "average": lambda x, world: send.all_reduce(x, "avg"),
    "all_to_all": even,
    "broadcast": lambda x, world: send.broadcast(x, 1),
    "reduce_scatter": lambda x, world: send.reduce_scatter(x, "sum", world),
}


@pytest.mark.parametrize(("form", "world"), [("int8", 2), ("int4:32:bf16:hadamard", 2), ("bf16", 4), ("int8", 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_bit_for_bit_at_every_size_and_as_with_known_sizes(
    kind: str, form: str, world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms of one all_reduce are summed in the order of the ranks by the reference, too."""
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", 0)  # so that sums over 4 ranks go in two shots
    shapes = [(world * rows, columns) for rows, columns in SHAPES]
    policy = Policy(form, tuple(FORMS), 0)

    def function(x: Tensor) -> Tensor:
        return KINDS[kind](x, world)

    gm = traced(function, value(0, *shapes[0]), world=world, dynamic=True)
    assert InsertCodecs(policy).run(gm).changed == 1
    runs = [[(value(rank, *shape),) for rank in range(world)] for shape in shapes]
    before = [lockstep(gm, run) for run in runs]
    assert LowerCollectives().run(gm).changed == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    (record,) = collectives(gm)
    assert record.outcome == "lowered"
    if kind in ("all_reduce", "average"):
        assert ("all_to_all" in record.kernel) == (world == 4 and "hadamard" not in form)
    for shape, run, reference in zip(shapes, runs, before, strict=True):
        known = lockstep(compress(traced(function, value(0, *shape), world=world), policy), run)
        after = lockstep(gm, run)
        assert all(torch.equal(a, b) for a, b in zip(after, reference, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(after, known, strict=True))


def test_a_size_is_asked_what_a_number_would_be_and_guards_the_graph() -> None:
    """Ranks that compiled for other sizes, or for any, decide alike at every call."""
    small = traced(send.all_reduce, value(0, 4, 50), dynamic=True)
    assert InsertCodecs(Policy("int8")).run(small).changed == 0
    (record,) = collectives(small)
    assert not record.asked
    assert record.reason.endswith(" bytes are fewer than the policy's min_bytes of 65,536")
    assert any("< 65536" in guard for guard in guards(small)), guards(small)
    large = traced(send.all_reduce, value(0, 400, 50), dynamic=True)
    assert InsertCodecs(Policy("int8")).run(large).changed == 1
    assert any(">= 65536" in guard for guard in guards(large)), guards(large)
    tiny = traced(send.all_reduce, value(0, 2, 3), dynamic=True)
    assert InsertCodecs(ALL).run(tiny).changed == 0
    (record,) = collectives(tiny)
    assert record.reason.endswith(" elements are so few that int8:128:bf16 sends no fewer bytes")
    assert guards(tiny)


def test_a_link_takes_what_is_not_known_for_large() -> None:
    slow, fast = Link(1e6, 1e-4, 1e9, 1e9), Link(1e12, 1e-4, 1e9, 1e9)
    for link, count in ((slow, 1), (fast, 0)):
        gm = traced(send.all_reduce, value(0, 40, 50), dynamic=True)
        assert InsertCodecs(Policy("int8", min_bytes=0, link=link)).run(gm).changed == count


# Sizes that come from the contents of tensors


def routed(x: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """What each rank has for each other rank, by numbers that only the data tell."""
    sizes = [outputs.tolist(), inputs.tolist()]
    for size in (*sizes[0], *sizes[1]):
        torch._check(size >= 0)
    return send.wait(send.ops.all_to_all_single(x, *sizes, "0"))


SPLITS = (((2, 3), (4, 0)), ((0, 0), (0, 0)), ((1, 6), (5, 2)), ((300, 1), (2, 0)))
"""For every run: the rows that each rank sends to each."""


def runs(columns: int, dtype: torch.dtype = torch.float32) -> list[list[tuple[Tensor, ...]]]:
    return [
        [
            (value(rank, sum(splits[rank]), columns, dtype=dtype), torch.tensor([s[rank] for s in splits]),
             torch.tensor(splits[rank]))
            for rank in range(2)
        ]
        for splits in SPLITS
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "form", "dtype"),
    [
        (128, "int8:128:bf16", torch.float32), (50, "int8:128:bf16", torch.float32),
        (50, "bf16", torch.float32), (384, "int4:32:bf16:hadamard", torch.bfloat16),
        (90, "int4:32:bf16:hadamard", torch.bfloat16),
    ],
)  # fmt: skip
def test_uneven_parts_bit_for_bit(columns: int, form: str, dtype: torch.dtype) -> None:
    policy = Policy(form, "all_to_all", 0)
    everything = runs(columns, dtype)
    gm = traced(routed, *everything[0][0], dynamic=True)
    plain = [lockstep(gm, run) for run in everything]
    assert InsertCodecs(policy).run(gm).changed == 1
    assert InsertCodecs(policy).run(gm).changed == 0
    before = [lockstep(gm, run) for run in everything]
    assert LowerCollectives().run(gm).changed == 1
    assert LowerCollectives().run(gm).changed == 0
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    sent = [node for node in gm.graph.nodes if node.target is send.ops.all_to_all_single.default]
    assert [node.args[0].meta["val"].dtype for node in sent] == [torch.uint8]
    for run, reference, exact in zip(everything, before, plain, strict=True):
        after = lockstep(gm, run)
        assert all(torch.equal(a, b) for a, b in zip(after, reference, strict=True))
        assert all(a.shape == b.shape for a, b in zip(after, exact, strict=True))
    assert not torch.equal(before[0][0], plain[0][0])


def test_a_sum_of_an_unknown_size_is_taken_for_large() -> None:
    def function(x: Tensor, n: Tensor) -> Tensor:
        size = n.item()
        torch._check(size >= 0)
        torch._check(size <= x.shape[0])
        return send.all_reduce(x.narrow(0, 0, size))

    inputs = [(value(rank, 40, 50), torch.tensor(33)) for rank in range(4)]
    gm = traced(function, *inputs[0], world=4, dynamic=True)
    assert InsertCodecs(Policy("int8")).run(gm).changed == 1
    before = lockstep(gm, inputs)
    assert LowerCollectives().run(gm).changed == 1
    gm.graph.eliminate_dead_code()
    assert [record.kernel for record in collectives(gm)] == ["all_to_all of int8:128:bf16, summed, all_gather"]
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))


def test_parts_that_nothing_proves_equal_are_declined() -> None:
    def function(x: Tensor, n: Tensor) -> Any:
        size = n.item()
        torch._check(size >= 0)
        torch._check(size <= x.shape[0])
        return send.reduce_scatter(x.narrow(0, 0, size))

    gm = traced(function, value(0, 40, 51), torch.tensor(8), dynamic=True)
    assert InsertCodecs(ALL).run(gm).changed == 0
    (record,) = collectives(gm)
    assert record.asked
    assert record.reason.endswith(" elements are not known to make 2 equal parts")
