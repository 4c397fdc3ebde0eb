from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interpret import operators
from pipeline_run import Do, decisions, kernel_names, reason, run_stages

ADD, MUL = (lambda a, b: a + b), (lambda a, b: a * b)


def two_branches(combine: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """Both branches are read twice, so no convolution can absorb what combines them."""

    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b = m.a(x), m.b(x)
        return m.c(combine(a, b)), m.c(a), m.c(b)

    return Do(forward, a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), c=nn.Conv2d(4, 4, 3))


@pytest.mark.parametrize(("name", "combine"), [("add", ADD), ("mul", MUL)])
def test_codes_are_read_where_convolutions_write_them(name: str, combine: Callable[[Tensor, Tensor], Tensor]) -> None:
    r = run_stages(two_branches(combine), torch.randn(2, 4, 9, 9))
    text = operators(r.lowered)
    # The second and third uses of the branches share their codes.
    assert f"{name} = {name}.Tensor(dequantize_per_tensor_1, dequantize_per_tensor_2)" in text
    assert text.count("= quantize_per_tensor(") == 2  # the input's, and the combination's; kernels write all others
    assert kernel_names(r.lowered).count("fused loop") == 1


def test_relu_is_part_of_the_loop() -> None:
    r = run_stages(two_branches(lambda a, b: torch.relu(a * b)), torch.randn(2, 4, 9, 9))
    assert "fused loop with relu" in kernel_names(r.lowered)


def test_the_residual_stream_of_a_transformer_stays_in_float() -> None:
    model = Do(lambda m, x: torch.tanh(m.a(x)) + x, a=nn.Linear(8, 8))
    assert reason(model, torch.randn(4, 8), op="add.Tensor") == "pays only where a quantized conv stands before it"


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (lambda m, x: m.scale, "the operands differ in shape"),
        (lambda m, x: m.whole, "an operand is a constant"),
        (lambda m, x: x, "pays only where a quantized conv stands before it"),
    ],
)
def test_near_misses(other: Callable[[Any, Tensor], Tensor], expected: str) -> None:
    model = Do(
        lambda m, x: torch.tanh(m.a(x)) * other(m, x), a=nn.Conv2d(4, 4, 1),
        scale=nn.Parameter(torch.ones(4, 1, 1)), whole=nn.Parameter(torch.ones(2, 4, 8, 8)),
    )  # fmt: skip
    assert reason(model, torch.randn(2, 4, 8, 8), op="mul.Tensor") == expected


def test_adding_a_number_is_another_operation() -> None:
    found = decisions(Do(lambda m, x: m.a(x) + 1, a=nn.Conv2d(4, 4, 3)), torch.randn(2, 4, 8, 8))
    assert found["add.Tensor"].reason == "the operands differ in shape"
