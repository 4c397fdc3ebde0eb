from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interpret import operators
from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, WEIGHT_BFLOAT16, Do, decisions, kernel_names, reason, run_stages


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(16, 8))


def test_a_product_with_a_stored_matrix() -> None:
    r = run_stages(
        Do(lambda m, x: torch.addmm(m.b, x, m.w), w=weight(), b=nn.Parameter(torch.randn(8))), torch.randn(4, 16)
    )
    assert (
        operators(r.quantized)
        == """\
dequantize_per_channel = dequantize_per_channel(codes(w), 1, -127, 127, int8)
inputs_0 = input
quantize_per_tensor = quantize_per_tensor(inputs_0, s, z, 0, 255, uint8)
dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, s, z, 0, 255, uint8)
addmm = addmm(b, dequantize_per_tensor, dequantize_per_channel)
return [addmm]"""
    )
    kernel = "onednn.qlinear_pointwise(quantize_per_tensor, s, z, packed(w), b, 1, 0, float32, none, [], none)"
    assert (
        operators(r.lowered)
        == f"""\
inputs_0 = input
quantize_per_tensor = quantize_per_tensor(inputs_0, s, z, 0, 255, uint8)
qlinear_pointwise = {kernel}
return [qlinear_pointwise]"""
    )


SPELLINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], tuple[int, ...]]] = {
    "mm": (lambda m, x: torch.mm(x, m.w), (4, 16)),
    "matmul 1d": (lambda m, x: x @ m.w, (16,)),
    "matmul 3d": (lambda m, x: x @ m.w, (2, 3, 16)),
    "matmul 4d": (lambda m, x: x @ m.w, (2, 2, 2, 16)),
    "transposed": (lambda m, x: x @ m.v.t(), (2, 3, 16)),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), (4, 16)),
}


KERNELS = {
    STATIC: "onednn.qlinear", PER_TENSOR: "onednn.qlinear", PER_TOKEN: "onednn.qlinear (per token)",
    WEIGHT_BFLOAT16: "aten._weight_int8pack_mm",
}  # fmt: skip


@pytest.mark.parametrize("config", KERNELS, ids=["static", "tensor", "token", "w"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_runs_on_the_kernel(spelling: str, config: Any) -> None:
    function, shape = SPELLINGS[spelling]
    model = Do(function, w=weight(), v=nn.Parameter(torch.randn(8, 16)), b=nn.Parameter(torch.randn(8)))
    r = run_stages(model, torch.randn(shape), config=config)
    (kernel,) = kernel_names(r.lowered)
    assert kernel.removesuffix(f" chosen for about {math.prod(shape[:-1])} rows, as in the example") == KERNELS[config]
    assert len(r.kernels) == 1


def test_epilogues_as_for_a_linear() -> None:
    r = run_stages(Do(lambda m, x, y: torch.relu(x @ m.w + y), w=weight()), torch.randn(4, 16), torch.randn(4, 8))
    assert kernel_names(r.lowered) == ["onednn.qlinear with add, relu"]


def test_two_activations_are_declined() -> None:
    expected = "both operands are activations, and packing one at run time costs too much"
    assert reason(Do(lambda m, x: x @ x.t()), torch.randn(4, 16), op="matmul") == expected


NO_MATRIX = "the stored operand is not a matrix"


@pytest.mark.parametrize(
    ("model", "op", "expected"),
    [
        (Do(lambda m, x: x @ m.w, w=nn.Parameter(torch.ones(3, 16, 8))), "matmul", NO_MATRIX),
        (Do(lambda m, x: x @ m.w, w=nn.Parameter(torch.ones(16))), "matmul", NO_MATRIX),
        (
            Do(lambda m, x: torch.addmm(x[:, :8], x, m.w), w=weight()), "addmm",
            "the added term is no stored bias vector",
        ),
        (
            Do(lambda m, x: torch.addmm(m.b, x, m.w), w=weight(), b=nn.Parameter(torch.randn(4, 8))), "addmm",
            "the added term is no stored bias vector",
        ),
    ],
)  # fmt: skip
def test_near_misses(model: nn.Module, op: str, expected: str) -> None:
    assert reason(model, torch.randn(4, 16), op=op) == expected


def test_a_scaled_addmm_is_another_operation() -> None:
    """``addmm`` with beta or alpha matches no alternative, so no reason of the pattern's is given."""
    model = Do(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5), w=weight(), b=nn.Parameter(torch.randn(8)))
    assert decisions(model, torch.randn(4, 16))["addmm"].reason == "no pattern of the catalogue covers it"


def test_a_bias_that_broadcasts_is_no_bias_vector() -> None:
    model = Do(lambda m, x: torch.addmm(m.b, x, m.w), w=weight(), b=nn.Parameter(torch.randn(1)))
    assert reason(model, torch.randn(4, 16), op="addmm") == "the added term is no stored bias vector"
