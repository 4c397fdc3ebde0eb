from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import export

from qpass.ir.normalize import drop_noops, eliminate_dead, functionalize_inplace
from qpass.ir.plain_form import normalize
from qpass.ir.text import graph_text

aten = torch.ops.aten
Pass = Callable[[fx.GraphModule], int]


class Model(nn.Module):
    """A module around a function, with a weight, a buffer and a constant for it to use."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("state", torch.zeros(4))

    def forward(self, x: Tensor) -> object:
        return self.function(self, x)


def traced(function: Callable[..., object], x: Tensor) -> fx.GraphModule:
    return export(Model(function).eval(), (x,)).module(check_guards=False)


def changed(run: Pass, function: Callable[..., object], x: Tensor) -> tuple[int, str]:
    """Run a pass, check that results are equal and that a second run does nothing; its count and the graph's text."""
    gm = traced(function, x)
    before, after = x.clone(), x.clone()
    expected = gm(before)
    count = run(gm)
    assert run(gm) == 0
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(after), expected, atol=0, rtol=0)
    assert torch.equal(before, after)  # what was written to the input
    return count, graph_text(gm)


# ---- functionalize_inplace


@pytest.mark.parametrize(
    ("write", "read"),
    [
        (lambda y, x: y.relu_(), "relu(linear)"),
        (lambda y, x: y.add_(x), "add.Tensor(linear, x)"),
        (lambda y, x: y.mul_(2.0), "mul.Tensor(linear, 2)"),
        (lambda y, x: y.clamp_(-1, 1), "clamp(linear, -1, 1)"),
        (lambda y, x: torch.nn.functional.silu(y, inplace=True), "silu(linear)"),
        (lambda y, x: torch.nn.functional.hardswish(y, inplace=True), "hardswish(linear)"),
        (lambda y, x: torch.nn.functional.hardtanh(y, 0.0, 6.0, inplace=True), "hardtanh(linear, 0, 6)"),
        (lambda y, x: y.masked_fill_(x > 0, -1.0), "masked_fill.Scalar(linear, gt, -1)"),
        (lambda y, x: y.copy_(x), "copy(linear, x)"),
        (lambda y, x: y.unsqueeze_(0), "unsqueeze(linear, 0)"),
    ],
)
def test_a_write_to_memory_of_the_graph_becomes_functional(write: Callable[..., object], read: str) -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = torch.nn.functional.linear(x, m.weight)
        write(y, x)
        return y.sum(0)

    count, text = changed(functionalize_inplace, function, torch.randn(2, 4))
    name = read.partition("(")[0].partition(".")[0]
    assert count == 1
    assert read in text
    assert f"sum.dim_IntList({name}_, [0])" in text  # later reads see the result


def test_a_chain_of_writes_becomes_a_chain_of_values() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = x @ m.weight
        y += x
        y.relu_()
        y.view(8).mul_(3.0)
        return y

    count, text = changed(functionalize_inplace, function, torch.randn(2, 4))
    assert count == 2  # the last one writes through a view, whose base is read later
    assert text.splitlines()[1:] == [
        "matmul = matmul(x, weight)",
        "add_ = add.Tensor(matmul, x)",
        "relu_ = relu(add_)",
        "view = view(relu_, [8])",
        "mul_ = mul_.Tensor(view, 3)",
        "return [relu_]",
    ]


def write_to_input(m: Model, x: Tensor) -> Tensor:
    return x.relu_() + 1


def write_to_view_of_input(m: Model, x: Tensor) -> Tensor:
    return x[0].mul_(2.0)


def write_to_buffer(m: Model, x: Tensor) -> Tensor:
    m.state.add_(x.sum(0))
    return x + m.state


def write_under_an_older_view(m: Model, x: Tensor) -> Tensor:
    y = x + 1
    row = y[0]
    y.relu_()
    return row + y.sum()


def write_through_a_view(m: Model, x: Tensor) -> Tensor:
    y = x - 1
    y[0].relu_()
    return y


def write_that_narrows(m: Model, x: Tensor) -> Tensor:
    y = x.to(torch.bfloat16)
    y.add_(x)  # add(y, x) would be float32
    return y


def write_after_dropout_that_is_off(m: Model, x: Tensor) -> Tensor:
    y = torch.nn.functional.dropout(x, 0.5, training=False)  # x itself
    return y.relu_()


@pytest.mark.parametrize(
    "function",
    [
        write_to_input, write_to_view_of_input, write_to_buffer, write_under_an_older_view, write_through_a_view,
        write_that_narrows, write_after_dropout_that_is_off,
    ],
)  # fmt: skip
def test_a_write_that_somebody_could_see_stays(function: Callable[..., object]) -> None:
    gm = traced(function, torch.randn(2, 4))
    before = graph_text(gm)
    assert functionalize_inplace(gm) == 0
    assert graph_text(gm) == before
    assert "_" in before


# ---- drop_noops


def test_what_returns_its_input_is_dropped() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        y = torch.nn.functional.dropout(x * 2, 0.3, training=False)
        y = torch.nn.functional.dropout(y, 0.0, training=True)
        return y.detach().to(torch.float32)[:, :].type_as(x).exp()

    count, text = changed(drop_noops, function, torch.randn(2, 4))
    assert count >= 5
    assert [line for line in text.splitlines() if "_assert" not in line] == [
        "x = input", "mul = mul.Tensor(x, 2)", "exp = exp(mul)", "return [exp]",
    ]  # fmt: skip


def test_a_copy_of_a_constant_is_dropped_where_nothing_could_tell() -> None:
    def read(m: Model, x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0])

    def returned(m: Model, x: Tensor) -> tuple[Tensor, Tensor]:
        constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
        return x + constant, constant

    def written(m: Model, x: Tensor) -> Tensor:
        constant = torch.tensor([1.0, 2.0, 3.0, 4.0])
        alias = constant[0]
        constant.add_(x[0])
        return constant + alias

    def both(gm: fx.GraphModule) -> int:
        return functionalize_inplace(gm) + drop_noops(gm)

    assert "lift_fresh_copy" not in changed(both, read, torch.randn(2, 4))[1]
    assert "lift_fresh_copy" in changed(both, returned, torch.randn(2, 4))[1]
    assert "lift_fresh_copy" in changed(both, written, torch.randn(2, 4))[1]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x.to(torch.float64),
        lambda m, x: x.clone(),
        lambda m, x: x.contiguous().view(-1),
        lambda m, x: x[:, 1:],
        lambda m, x: x[:, ::2],
        lambda m, x: x.to(torch.float32, memory_format=torch.contiguous_format),
    ],
)
def test_what_does_something_stays(function: Callable[..., object]) -> None:
    assert changed(drop_noops, function, torch.randn(2, 4))[0] == 0


# ---- eliminate_dead


def test_unused_operators_and_constants_go() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        pooled = torch.tanh(x @ m.weight)
        torch.nn.functional.scaled_dot_product_attention(pooled[None], pooled[None], pooled[None])
        return x + 1

    gm = traced(function, torch.randn(2, 4))
    eliminate_dead(gm)
    assert graph_text(gm).splitlines() == ["x = input", "add = add.Tensor(x, 1)", "return [add]"]
    assert not gm.graph.find_nodes(op="get_attr")


def test_effects_stay_although_nothing_reads_them() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        m.state.add_(1)  # a write
        torch.rand(2)  # advances the generator
        count = x.sum().to(torch.int64).item()
        torch._check(count >= 3)  # an assertion
        return x + 1

    gm = traced(function, torch.ones(2, 4))
    eliminate_dead(gm)
    text = graph_text(gm)
    assert [word for word in ("add_.Tensor(state", "rand([2]", "_assert_scalar(", "item(") if word not in text] == []


def test_dtype_assertions_on_computed_values_go_and_on_inputs_stay() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        return x.to(torch.float32) * (x + 1).to(torch.float32)

    gm = traced(function, torch.ones(2, 4))
    asserted = [node.args[0].name for node in gm.graph.nodes if "_assert_tensor_metadata" in str(node.target)]
    assert asserted == ["x", "add"]
    eliminate_dead(gm)
    asserted = [node.args[0].name for node in gm.graph.nodes if "_assert_tensor_metadata" in str(node.target)]
    assert asserted == ["x"]


# ---- together


def test_normalize_keeps_only_what_is_read_and_shares_it() -> None:
    def function(m: Model, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.nn.functional.dropout(x @ m.weight, 0.1, training=False)
        m.state * 2
        return y.relu_()

    gm = traced(function, torch.randn(2, 4))
    weight = gm.weight
    result = normalize(gm)
    assert graph_text(result).splitlines()[1:] == [
        "matmul = matmul(x, weight)",
        "relu_ = relu(matmul)",
        "return [relu_]",
    ]
    assert dict(result.named_parameters()).keys() == {"weight"}
    assert not list(result.buffers())
    assert result.weight is weight
