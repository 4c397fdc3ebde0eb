from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._prims_common import make_contiguous_strides_for
from torch._subclasses.fake_tensor import FakeTensorMode

import lockstep as send
from lockstep import lockstep, ops, text, traced, value
from qpass.comm.graph.collective import WORLD_KEY
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.policy.cost import FORMS
from qpass.comm.policy.policy import Policy

ALL = Policy("int8", tuple(FORMS), 0)


def in_place(target: Any, *args: Any, out: tuple[int, ...] | None = None) -> fx.GraphModule:
    """``y = x * 2; z = wait(target(y, *args)); z + 1, written * 3``, which a trace would have made functional."""
    graph, mode = fx.Graph(), FakeTensorMode()

    def add(node: fx.Node, val: Tensor) -> fx.Node:
        node.meta |= {"val": mode.from_tensor(val), WORLD_KEY: 2}
        return node

    x = add(graph.placeholder("x"), value(0, 4, 50))
    y = add(graph.call_function(torch.ops.aten.mul.Tensor, (x, 2)), value(0, 4, 50))
    shape, kwargs, written = (4, 50), {}, y
    if out is not None:
        shape = out
        written = add(graph.call_function(torch.ops.aten.new_zeros.default, (x, list(out))), torch.zeros(out))
        kwargs = {"out": written}
    issue = add(graph.call_function(target, (y, *args), kwargs), torch.zeros(shape))
    between = add(graph.call_function(torch.ops.aten.exp.default, (x,)), torch.zeros(4, 50))
    wait = add(graph.call_function(ops.wait_tensor.default, (issue,)), torch.zeros(shape))
    first = add(graph.call_function(torch.ops.aten.add.Tensor, (wait, 1)), torch.zeros(shape))
    second = add(graph.call_function(torch.ops.aten.mul.Tensor, (written, 3)), torch.zeros(shape))
    graph.output((first, second, between))
    return fx.GraphModule(torch.nn.Module(), graph)


CASES: list[tuple[Any, tuple[Any, ...], tuple[int, ...] | None, Callable[[Tensor], Tensor]]] = [
    (ops.all_reduce_.default, ("avg", "0"), None, lambda x: send.all_reduce(x, "avg")),
    (ops.broadcast_.default, (1, "0"), None, lambda x: send.broadcast(x, 1)),
    (ops.all_gather_into_tensor_out.default, (2, "0"), (8, 50), send.all_gather),
    (ops.reduce_scatter_tensor_out.default, ("sum", 2, "0"), (2, 50), send.reduce_scatter),
]


def test_the_sum_is_written_where_it_is_waited_for() -> None:
    gm = in_place(ops.all_reduce_.default, "sum", "0")
    assert text(gm) == [
        "mul = mul.Tensor(x, 2)",
        "all_reduce_ = all_reduce_(mul, sum, 0)",
        "exp = exp(x)",
        "wait_tensor = wait_tensor(all_reduce_)",
        "add = add.Tensor(wait_tensor, 1)",
        "mul_1 = mul.Tensor(mul, 3)",
        "return [add, mul_1, exp]",
    ]
    compress(gm, ALL)
    assert text(gm) == [
        "mul = mul.Tensor(x, 2)",
        "encode = encode(mul, int8:128:bf16)",
        "all_gather_into_tensor = all_gather_into_tensor(encode, 2, 0)",
        "exp = exp(x)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "view = view(wait_tensor, [2, 260])",
        "decode_reduce = decode_reduce(view, 200, float32, int8:128:bf16, 1)",
        "view_1 = view(decode_reduce, [4, 50])",
        "copy_ = copy_(mul, view_1)",
        "add = add.Tensor(view_1, 1)",
        "mul_1 = mul.Tensor(mul, 3)",
        "return [add, mul_1, exp]",
    ]
    once = text(gm)
    compress(gm, ALL)
    assert text(gm) == once


@pytest.mark.parametrize(("target", "args", "out", "functional"), CASES, ids=[str(case[0]) for case in CASES])
def test_bit_for_bit_as_the_functional_form(
    target: Any, args: tuple[Any, ...], out: tuple[int, ...] | None, functional: Callable[[Tensor], Tensor]
) -> None:
    inputs = [(value(rank, 4, 50),) for rank in range(2)]
    gm = compress(in_place(target, *args, out=out), ALL)
    (record,) = collectives(gm)
    assert record.outcome == "lowered"

    def reference(x: Tensor) -> tuple[Tensor, ...]:
        z = functional(x * 2)
        return z + 1, z * 3, x.exp()

    expected = lockstep(compress(traced(reference, *inputs[0]), ALL), inputs)
    for found, wanted in zip(lockstep(gm, inputs), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_near_misses_are_declined() -> None:
    gm = in_place(ops.all_reduce_.default, "max", "0")
    before = text(gm)
    (record,) = collectives(compress(gm, ALL))
    assert (record.op, record.reason, record.asked) == ("all_reduce", "a max cannot be taken over payloads", True)
    assert text(gm) == before
    (record,) = collectives(compress(in_place(ops.all_reduce_.default, "sum", "0"), Policy("int8")))
    assert record.reason == "800 bytes are fewer than the policy's min_bytes of 65,536"
    unwaited = in_place(ops.all_reduce_.default, "sum", "0")
    (wait,) = unwaited.graph.find_nodes(op="call_function", target=ops.wait_tensor.default)
    wait.args = (wait.args[0].args[0],)  # waits for the tensor, which nothing tells from another reader
    (record,) = collectives(compress(unwaited, ALL))
    assert record.reason == "its result is read without being waited for, or more than once"


def wrapped(x: Tensor, *size: int) -> Tensor:
    """``all_gather_into_tensor_out`` of two ranks as AOTAutograd writes it; its output is made where it runs."""
    size = size or (2 * len(x), *x.shape[1:])
    said = {"_out_size": size, "_out_stride": make_contiguous_strides_for(size)}
    said |= {"_out_dtype": x.dtype, "_out_device": x.device}
    return torch.ops.higher_order.auto_functionalized_v2(
        ops.all_gather_into_tensor_out.default, input=x, group_size=2, group_name="0", _all_bases=[], **said
    )


def test_what_autograd_wrapped_becomes_functional() -> None:
    def function(x: Tensor) -> tuple[Tensor, ...]:
        gathered = wrapped(x * 2)
        between = x.exp()
        send.wait(gathered)  # read by nobody, as where it is called for its output
        return gathered * 3, between

    gm = traced(function, value(0, 4, 50))
    assert [line.split("(")[0] for line in text(gm)] == [
        "mul = mul.Tensor", "auto_functionalized_v2 = auto_functionalized_v2", "exp = exp",
        "wait_tensor = wait_tensor", "mul_1 = mul.Tensor", "return [mul_1, exp]",
    ]  # fmt: skip
    compress(gm, ALL)
    assert text(gm) == [
        "mul = mul.Tensor(x, 2)",
        "encode = encode(mul, int8:128:bf16)",
        "all_gather_into_tensor = all_gather_into_tensor(encode, 2, 0)",
        "exp = exp(x)",
        "wait_tensor = wait_tensor(all_gather_into_tensor)",
        "decode = decode(wait_tensor, 512, float32, int8:128:bf16)",
        "view = view(decode, [2, 256])",
        "slice = slice.Tensor(view, 1, 0, 200)",
        "clone = clone(slice, memory_format=torch.contiguous_format)",
        "view_1 = view(clone, [8, 50])",
        "mul_1 = mul.Tensor(view_1, 3)",
        "return [mul_1, exp]",
    ]
    (record,) = collectives(gm)
    assert (record.op, record.outcome, record.group) == ("all_gather", "lowered", "0")


def too_early(x: Tensor) -> Tensor:
    gathered = wrapped(x)
    return gathered.exp() + send.wait(gathered)


def by_the_older_wrapper(x: Tensor) -> Tensor:
    call = torch._higher_order_ops.auto_functionalize.auto_functionalized
    _, out = call(ops.all_gather_into_tensor_out.default, input=x, group_size=2, group_name="0", out=x.new_empty(8, 50))
    return send.wait(out)


DECLINED: dict[str, Callable[[Tensor], Tensor]] = {
    "its result is read without being waited for, or more than once": too_early,
    "its output has another shape than what is received": lambda x: send.wait(wrapped(x, 2, 4, 50)),
    "this form of collective is not compressed": by_the_older_wrapper,
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_autograd_wrapped_may_be_declined(reason: str) -> None:
    (record,) = collectives(compress(traced(DECLINED[reason], value(0, 4, 50)), ALL))
    assert (record.op, record.outcome, record.reason, record.asked) == ("all_gather", "float", reason, True)
    (record,) = collectives(compress(traced(DECLINED[reason], value(0, 4, 50)), Policy("int8", "all_reduce", 0)))
    assert not record.is_missed
