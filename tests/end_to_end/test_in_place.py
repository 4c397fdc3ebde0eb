"""Models that write in place: what is quantized, cast or folded is read when the model reads it, not before the write.

A stale value costs whole parts of the result, so the SQNR falls below 20 dB; rounding alone leaves 35 dB and more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import qpass
from pipeline_run import Do, same
from qpass.presets import int8_dynamic, int8_static, int8_weight_only

X = torch.linspace(-3, 2, 64).reshape(4, 16).sin()
IMAGES = torch.linspace(-3, 2, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()


def zeroed_column(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    y[:, 0] = 0
    y[:, 3:5] *= 2
    return m.b(y)


def written_view(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    flat = y.view(-1)
    flat.add_(1.0)
    return m.b(y) + m.b(flat.view(4, 16))


def read_before_and_after(m: Any, x: Tensor) -> Tensor:
    y = F.relu(m.a(x))
    before = m.b(y)
    y[0] = 5.0
    return before + m.b(y)


def filled_by_parts(m: Any, x: Tensor) -> Tensor:
    y = torch.zeros(4, 32)
    y[:, :16] = m.a(x)
    y[:, 16:] = m.b(x)
    return m.wide(y)


def filled_diagonal(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ x.t()
    y.fill_diagonal_(0.0)
    z = y @ x
    z.t()[0] = 3.0
    return m.a(z), torch.tanh(y)


def written_chunk(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    first, second = y.chunk(2, 1)
    first.sigmoid_()
    return m.b(torch.cat([second, first], 1)) + y


def written_input(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    x.add_(1.0)
    return y + m.b(x)


def zeroed_rows_of_an_image(m: Any, x: Tensor) -> Tensor:
    y = m.c(x)
    y[:, :, 0] = 0
    return m.d(F.relu(y)).mean((2, 3))


LINEAR = (
    zeroed_column, written_view, read_before_and_after, filled_by_parts, filled_diagonal, written_chunk, written_input,
)  # fmt: skip
CONFIGS = {
    "static": int8_static(compute_dtype=torch.bfloat16),
    "dynamic": int8_dynamic(compute_dtype=torch.bfloat16),
    "weight_only": int8_weight_only(compute_dtype=torch.bfloat16),
}
CASES = [(function, X, name) for function in LINEAR for name in CONFIGS] + [(zeroed_rows_of_an_image, IMAGES, "static")]


def model(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    linears = {"a": nn.Linear(16, 16), "b": nn.Linear(16, 16), "wide": nn.Linear(32, 16)}
    return Do(function, c=nn.Conv2d(3, 8, 3, padding=1), d=nn.Conv2d(8, 8, 3), **linears).eval()


@pytest.mark.parametrize(("function", "x", "name"), CASES, ids=[f"{f.__name__}-{n}" for f, _, n in CASES])
@torch.no_grad()
def test_values_are_read_when_the_model_reads_them(function: Callable[..., Any], x: Tensor, name: str) -> None:
    net, config = model(function), CONFIGS[name]
    expected = net(x.clone())
    prepared = qpass.prepare(net, (x.clone(),), config=config)
    assert same(prepared(x.clone()), expected), "observers change the result"
    quantized = qpass.convert(prepared)
    assert decibels(expected, quantized(x.clone())) > 35
    assert decibels(expected, qpass.lower(quantized)(x.clone())) > 35


@torch.no_grad()
def test_rows_that_inductor_lays_out_in_columns_are_copied_for_a_kernel_that_refuses_them() -> None:
    net = model(filled_diagonal)
    quantized = qpass.convert(qpass.prepare(net, (X,), config=CONFIGS["weight_only"]))
    assert decibels(net(X), torch.compile(quantized, backend="qpass")(X)) > 35


@torch.no_grad()
def test_a_write_shows_in_another_argument_of_the_same_memory() -> None:
    def twice(m: Any, x: Tensor, row: Tensor) -> Tensor:
        before = m.a(row)
        x.mul_(-2)
        m.row.copy_(before[0])
        return m.b(row) + m.a(m.base)

    net = model(twice)
    net.register_buffer("base", torch.ones(4, 16))
    net.register_buffer("row", net.base[1])
    x = X.clone()
    with torch.no_grad():
        again = X.clone() * -2
        base = torch.ones(4, 16)
        base[1] = net.a(X[1:2])[0]
        expected = net.b(again[1:2]) + net.a(base)
    assert decibels(expected, torch.compile(net, backend="qpass")(x, x[1:2])) > 35
    assert torch.equal(x, again)


@torch.no_grad()
def test_a_buffer_that_the_model_writes_is_no_constant() -> None:
    def counted(m: Any, x: Tensor) -> Tensor:
        m.count[:1] += 1.0
        return m.a(x) * (m.count * m.count)

    net = Do(counted, a=nn.Linear(16, 16)).eval()
    net.register_buffer("count", torch.zeros(1))
    quantized = qpass.convert(qpass.prepare(net, (X,), config=CONFIGS["weight_only"]))
    net.count.zero_()
    assert torch.equal(4 * quantized(X), quantized(X)), "the square of 1, then of 2"


def decibels(expected: Any, result: Any) -> float:
    a, b = (torch.cat([part.flatten() for part in tree_leaves(tree)]) for tree in (expected, result))
    return float(10 * torch.log10(a.square().sum() / (a - b).square().sum()))
