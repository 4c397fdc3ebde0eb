from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import lockstep as send
from lockstep import applied, lockstep, ops, text, traced, value
from qpass.comm.graph.collective import KINDS
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.comm.graph.rules.codes import GatherScales, MoveCodes, QuantizeBeforeGather
from qpass.comm.graph.shared import SHARED_KEY
from qpass.ir.record import record_of
from qpass.ir.rule import Rule
from qpass.ops import graph_ops
from qpass.quantize.passes.carry_codes import CarryCodes

RANGE = (-127, 127, torch.int8)


def everyones(x: Tensor) -> Tensor:
    """A scale that all ranks have, since they all got it from one maximum."""
    largest = x.abs().amax()
    return torch.ops.aten.copy(largest, send.all_reduce(largest, "max")) / 127  # as AOTAutograd has it


def own(x: Tensor) -> Tensor:
    """A scale of this rank's own values."""
    return x.abs().amax() / 127


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    """Rounded by a scale that is computed."""
    zero = torch.zeros((), dtype=torch.int64)
    codes = graph_ops.quantize_per_tensor.tensor(x, scale, zero, *RANGE)
    return graph_ops.dequantize_per_tensor.tensor(codes, scale, zero, *RANGE)


def static(x: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Rounded by numbers in the graph."""
    codes = graph_ops.quantize_per_tensor.default(x, 0.03, 3, 0, 100, dtype)
    return graph_ops.dequantize_per_tensor.default(codes, 0.03, 3, 0, 100, dtype)


def by_channel(x: Tensor, axis: int, shared: bool = False) -> Tensor:
    """Rounded by a scale for each index of a dimension."""
    others = [dim for dim in range(x.dim()) if dim != axis % x.dim()]
    largest = x.abs().amax(others) if others else x.abs()
    scales = (send.all_reduce(largest, "max") if shared else largest) / 127
    zeros = torch.zeros_like(scales, dtype=torch.int64)
    codes = graph_ops.quantize_per_channel.default(x, scales, zeros, axis, *RANGE)
    return graph_ops.dequantize_per_channel.default(codes, scales, zeros, axis, *RANGE)


def promised(gm: fx.GraphModule) -> fx.GraphModule:
    """As somebody leaves a graph whose qparams all ranks share."""
    for node in gm.graph.nodes:
        node.meta[SHARED_KEY] = True
    return gm


def sends(gm: fx.GraphModule) -> list[tuple[str, torch.dtype]]:
    return [(KINDS[n.target], n.args[0].meta["val"].dtype) for n in gm.graph.nodes if n.target in KINDS]


def test_codes_move_instead_of_values() -> None:
    gm = promised(traced(lambda x: send.all_gather(static(x)) + 1, value(0, 4, 50)))
    assert applied(gm, MoveCodes()).fired == {"MoveCodes": 1}
    assert text(gm) == [
        "quantize_per_tensor = quantize_per_tensor(x, 0.03, 3, 0, 100, int8)",
        "all_gather_into_tensor = all_gather_into_tensor(quantize_per_tensor, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "dequantize_per_tensor = dequantize_per_tensor(wait_tensor, 0.03, 3, 0, 100, int8, out_dtype=None)",
        "add = add.Tensor(dequantize_per_tensor, 1)",
        "return add",
    ]
    assert applied(gm, MoveCodes()).count == 0
    (record,) = (record_of(node) for node in gm.graph.nodes if node.target in KINDS)
    assert record is not None
    assert (record.kernel, record.reason) == ("all_gather of int8", "800 -> 200 bytes")


def test_scales_are_gathered_beside_the_codes() -> None:
    gm = traced(lambda x: send.all_gather(static(x)), value(0, 4, 50))
    assert applied(gm, GatherScales()).fired == {"GatherScales": 1}
    assert text(gm) == [
        "quantize_per_tensor = quantize_per_tensor(x, 0.03, 3, 0, 100, int8)",
        "all_gather_into_tensor = all_gather_into_tensor(quantize_per_tensor, 2, 0)",
        "full = full([1], 0.03, dtype=float32, device=cpu)",
        "full_1 = full([1], 3, dtype=int64, device=cpu)",
        "all_gather_into_tensor_1 = all_gather_into_tensor(full, 2, 0)",
        "all_gather_into_tensor_2 = all_gather_into_tensor(full_1, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "wait_tensor_1 = wait_tensor(all_gather_into_tensor_1)",
        "wait_tensor_2 = wait_tensor(all_gather_into_tensor_2)",
        "reshape = reshape(wait_tensor, [2, -1])",
        "dequantize_per_channel = dequantize_per_channel"
        "(reshape, wait_tensor_1, wait_tensor_2, 0, 0, 100, int8, out_dtype=float32)",
        "reshape_1 = reshape(dequantize_per_channel, [8, 50])",
        "return reshape_1",
    ]
    assert applied(gm, GatherScales()).count == 0


def test_a_quantize_node_moves_before_the_gather() -> None:
    def function(x: Tensor) -> Tensor:
        scale, zero = everyones(x), torch.zeros((), dtype=torch.int64)
        return graph_ops.quantize_per_tensor.tensor(send.all_gather(x * 2), scale, zero, *RANGE)

    inputs = [(value(rank, 4, 50),) for rank in range(2)]
    gm = traced(function, *inputs[0])
    before = lockstep(gm, inputs)
    assert sends(gm) == [("all_reduce", torch.float32), ("all_gather", torch.float32)]
    assert applied(gm, QuantizeBeforeGather()).fired == {"QuantizeBeforeGather": 1}
    assert sends(gm) == [("all_reduce", torch.float32), ("all_gather", torch.int8)]
    assert [line for line in text(gm) if "all_gather" in line or "quantize" in line] == [
        "quantize_per_tensor = quantize_per_tensor.tensor(mul, div, zeros, -127, 127, int8)",
        "all_gather_into_tensor = all_gather_into_tensor(quantize_per_tensor, 2, 0)",
        "wait_tensor_1 = wait_tensor(all_gather_into_tensor)",
    ]
    for a, b in zip(lockstep(gm, inputs), before, strict=True):
        assert a.dtype == torch.int8
        assert torch.equal(a, b)
    assert applied(gm, QuantizeBeforeGather()).count == 0


CASES: list[tuple[Callable[[Tensor], Tensor], str, Rule]] = [
    (lambda x: send.all_gather(rounded(x, everyones(x))), "all_gather", MoveCodes()),
    (lambda x: send.all_to_all(rounded(x, everyones(x))), "all_to_all", MoveCodes()),
    (lambda x: send.broadcast(rounded(x, everyones(x)), 1), "broadcast", MoveCodes()),
    (lambda x: send.all_gather(by_channel(x, 1, shared=True)), "all_gather", MoveCodes()),
    (lambda x: send.broadcast(by_channel(x, 0, shared=True), 1), "broadcast", MoveCodes()),
    (lambda x: send.all_gather(rounded(x, own(x))), "all_gather", GatherScales()),
    (lambda x: send.all_gather(static(x, torch.uint8)), "all_gather", GatherScales()),
    (lambda x: send.all_gather(by_channel(x, 0)), "all_gather", GatherScales()),
    (lambda x: send.all_gather(by_channel(x.view(4, 5, 10), 0)), "all_gather", GatherScales()),
    (lambda x: send.all_gather(by_channel(x.view(40, 5), -2)), "all_gather", GatherScales()),
]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_bit_for_bit(case: int, dynamic: bool) -> None:
    function, kind, rule = CASES[case]
    inputs = [(value(rank, 4, 50),) for rank in range(2)]
    gm = traced(function, *inputs[0], dynamic=dynamic)
    before = lockstep(gm, inputs)
    assert applied(gm, rule).fired == {rule.name: 1}
    assert next(dtype.itemsize for found, dtype in sends(gm) if found == kind) == 1
    for a, b in zip(lockstep(gm, inputs), before, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_a_chain_around_a_wait_collapses() -> None:
    """Values that are quantized again as they were, once gathered and viewed, are never dequantized."""

    def function(x: Tensor) -> Tensor:
        gathered = send.all_gather(static(x)).view(-1)
        return graph_ops.quantize_per_tensor.default(gathered, 0.03, 3, 0, 100, torch.int8)

    inputs = [(value(rank, 4, 50),) for rank in range(2)]
    gm = promised(traced(function, *inputs[0]))
    before = lockstep(gm, inputs)
    assert LowerCollectives().run(gm).changed == 1
    assert CarryCodes().run(gm).changed == 2  # the view, and the pair that cancels
    gm.graph.eliminate_dead_code()
    assert text(gm) == [
        "quantize_per_tensor = quantize_per_tensor(x, 0.03, 3, 0, 100, int8)",
        "all_gather_into_tensor = all_gather_into_tensor(quantize_per_tensor, 2, 0)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "view = view(wait_tensor, [-1])",
        "return view",
    ]
    assert all(torch.equal(a, b) for a, b in zip(lockstep(gm, inputs), before, strict=True))


UNPROVED = "nothing proves that its scale and zero point are equal on all ranks"


def late(x: Tensor) -> Tensor:
    issue = ops.all_gather_into_tensor(x, 2, "0")
    scale = everyones(x)
    zero = torch.zeros((), dtype=torch.int64)
    return graph_ops.quantize_per_tensor.tensor(send.wait(issue), scale, zero, *RANGE)


DECLINED: list[tuple[Callable[[Tensor], Tensor], Rule, str]] = [
    (lambda x: send.all_gather(static(x)), MoveCodes(), UNPROVED),
    (lambda x: send.broadcast(static(x)), MoveCodes(), UNPROVED),
    (lambda x: send.all_to_all(rounded(x, own(x))), MoveCodes(), UNPROVED),
    (lambda x: send.all_gather(rounded(x, torch.full((), 0.1))), MoveCodes(), UNPROVED),
    (lambda x: send.all_gather(rounded(x, everyones(x) * torch.rand(()))), MoveCodes(), UNPROVED),
    (lambda x: send.all_gather(rounded(x, everyones(x))), GatherScales(), "its scales are known everywhere"),
    (lambda x: send.all_gather(static(x, torch.int16)), GatherScales(), "codes of int16 do not travel"),
    (
        lambda x: send.all_gather(by_channel(x, 1)), GatherScales(),
        "its scales belong to dimension 1, along which nothing is gathered",
    ),
    (
        lambda x: send.all_gather(by_channel(x, 0, shared=True)), MoveCodes(),
        "its scales belong to the dimension that is moved along",
    ),
    (
        lambda x: send.all_gather(by_channel(x.view(-1), -1, shared=True)), MoveCodes(),
        "its scales belong to the dimension that is moved along",
    ),
    (
        lambda x: send.all_gather(by_channel(x.view(-1, 4), 0)), GatherScales(),
        "its scales take more bytes than its codes save",  # 12 for each 12
    ),
    (late, QuantizeBeforeGather(), "its scale is computed after the transfer has started"),
    (
        lambda x: graph_ops.quantize_per_tensor.default(send.all_gather(x), 0.03, 3, 0, 100, torch.int8),
        QuantizeBeforeGather(), UNPROVED,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("function", "rule", "reason"), DECLINED)
def test_near_misses_are_declined(function: Callable[[Tensor], Any], rule: Rule, reason: str) -> None:
    done = applied(traced(function, value(0, 4, 50)), rule)
    assert [why for _, _, why in done.refused] == [reason]
    assert done.count == 0


def test_another_groups_maximum_proves_nothing() -> None:
    def function(x: Tensor) -> Tensor:
        scale = send.wait(ops.all_reduce(x.abs().amax(), "max", "7")) / 127
        return send.broadcast(rounded(x, scale))

    assert applied(traced(function, value(0, 4, 50)), MoveCodes()).nearest_miss.endswith(UNPROVED)


def test_what_is_declined_is_told_of() -> None:
    gm = traced(lambda x: send.broadcast(static(x)), value(0, 4, 50))
    assert LowerCollectives().run(gm).changed == 0
    (record,) = (record_of(node) for node in gm.graph.nodes if node.target in KINDS)
    assert record is not None
    assert (record.op, record.outcome, record.reason) == ("broadcast", "float", UNPROVED)
