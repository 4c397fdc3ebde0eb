"""Large transfers in pieces: which ones, as what, and what is left whole. Ranks of their own hold the bits against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lockstep as send
from lockstep import lockstep, text, traced, value
from qpass.comm import Policy
from qpass.comm.eager import schedule
from qpass.comm.graph import pieces
from qpass.comm.graph.collective import WAIT
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.graph.passes.resolve_sizes import ResolveSizes
from qpass.comm.graph.passes.split_transfers import SplitTransfers
from qpass.comm.policy.cost import FORMS
from qpass.comm.wire import partition
from qpass.inspect.snapshot import snapshot

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "CHUNK", 128)


def compressed(function: Callable[..., Any], codec: str = "int8", **options: Any) -> fx.GraphModule:
    """The function of a tensor of 770 elements, which are 7 rows, compressed and not yet split."""
    return compress(traced(function, value(0, 10, 77)), Policy(codec, tuple(FORMS), 0), **options)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (
            send.all_reduce,
            [
                "send_pieces = send_pieces(x, int8:128:bf16, 1, 4, 2, 0)",
                "receive_pieces = receive_pieces(send_pieces, 770, float32, int8:128:bf16, 2, 1)",
                "view = view(receive_pieces, [10, 77])",
            ],
        ),
        (
            send.all_gather,  # 896 elements of each rank with the padding of the last row
            [
                "send_pieces = send_pieces(x, int8:128:bf16, 1, 4, 2, 0)",
                "receive_pieces = receive_pieces(send_pieces, 1792, float32, int8:128:bf16, 2, 0)",
            ],
        ),
        (
            send.reduce_scatter,  # each half is padded to 4 rows
            [
                "send_pieces = send_pieces(constant_pad_nd, int8:128:bf16, 2, 4, 2, 0)",
                "receive_pieces = receive_pieces(send_pieces, 385, float32, int8:128:bf16, 2, 1)",
            ],
        ),
    ],
)
def test_a_transfer_goes_in_pieces(function: Callable[[Tensor], Tensor], expected: list[str]) -> None:
    gm = compressed(function)
    before = snapshot(gm).sent_bytes
    assert SplitTransfers().run(gm).changed == 1
    gm.graph.lint()
    lines = text(gm)
    assert [line for line in lines if line in expected] == expected, lines
    assert not any(word in line for line in lines for word in ("encode", "decode", "wait"))
    assert snapshot(gm).sent_bytes == before
    assert SplitTransfers().run(gm).changed == 0
    (record,) = collectives(gm)
    assert record.outcome == "lowered"
    assert record.kernel.endswith(", in 4 pieces")


@pytest.mark.parametrize("function", [send.all_to_all, send.broadcast, lambda x: send.all_reduce(x, "max")])
def test_what_is_not_summed_or_gathered_is_left_whole(function: Callable[[Tensor], Tensor]) -> None:
    assert SplitTransfers().run(compressed(function)).changed == 0


def test_one_piece_is_left_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "CHUNK", 386)  # 770 elements are not two
    assert SplitTransfers().run(compressed(send.all_reduce)).changed == 0


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("numel", "count"), [(1024, 2), (1020, 0), (1021, 0), (896, 0)])
def test_of_a_sum_in_two_transfers_parts_must_start_on_rows(
    numel: int, count: int, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the last are 8 rows, 2 for each of 4 ranks: but one that is not full is no row of the rank behind it."""
    monkeypatch.setattr(schedule, "ONE_SHOT_BYTES", 0)
    inputs = [(value(rank, numel),) for rank in range(4)]
    gm = compress(traced(send.all_reduce, *inputs[0], world=4, dynamic=dynamic), Policy("int8", tuple(FORMS), 0))
    before = lockstep(gm, inputs)
    ResolveSizes().run(gm)
    assert SplitTransfers().run(gm).changed == count
    gm.graph.lint()
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))


def test_symbolic_sizes_become_nodes() -> None:
    gm = compress(traced(send.all_reduce, value(0, 10, 77), dynamic=True), Policy("int8", tuple(FORMS), 0))
    ResolveSizes().run(gm)
    assert SplitTransfers().run(gm).changed == 1
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    assert text(gm) == [
        "sym_size = sym_size.int(x, 0)",
        "sym_size_1 = sym_size.int(x, 1)",
        "send_pieces = send_pieces(x, int8:128:bf16, 1, 4, 2, 0)",
        "mul = mul(sym_size, sym_size_1)",
        "receive_pieces = receive_pieces(send_pieces, mul, float32, int8:128:bf16, 2, 1)",
        "view = view(receive_pieces, [sym_size, sym_size_1])",
        "return view",
    ]
    assert SplitTransfers().run(gm).changed == 0


def test_a_payload_with_two_readers_is_left_whole() -> None:
    gm = compressed(send.all_reduce)
    (wait,) = gm.graph.find_nodes(op="call_function", target=WAIT)
    with gm.graph.inserting_after(wait):
        other = gm.graph.call_function(aten.clone.default, (wait,))
    output = gm.graph.output_node()
    output.args = ((output.args[0], other),)
    assert SplitTransfers().run(gm).changed == 0


def test_only_a_compiled_graph_is_split_and_only_where_inductor_leaves_collectives_alone() -> None:
    def sends(gm: fx.GraphModule) -> int:
        return len(gm.graph.find_nodes(op="call_function", target=pieces.SEND))

    assert sends(compressed(send.all_reduce)) == 0
    assert sends(compressed(send.all_reduce, inductor=True)) == 1
    with torch._inductor.config.patch(bucket_all_gathers_fx="all"):
        assert sends(compressed(send.all_reduce, inductor=True)) == 0
