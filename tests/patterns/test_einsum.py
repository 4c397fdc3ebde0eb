"""Einsums that are a linear or a matrix product run on their kernels; all others say why not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pipeline_run import PER_TOKEN, STATIC, WEIGHT_ONLY, Do, decisions, kernel_names, run_stages
from qpass.patterns import OF_WEIGHTS

EINSUM = torch.ops.aten.einsum.default


def model(equation: str, *shape: int, left: bool = False) -> nn.Module:
    def forward(m: Do, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *((m.w, x) if left else (x, m.w)))  # type: ignore[attr-defined]

    return Do(forward, w=nn.Parameter(torch.randn(*shape)))


@pytest.mark.parametrize(
    ("equation", "shape", "pattern"),
    [
        ("bi,oi->bo", (6, 8), "linear"),
        ("... k, n k -> ... n", (6, 8), "linear"),
        ("bi,oi", (6, 8), "linear"),
        ("bi,io->bo", (8, 6), "matmul"),
        ("...i,io", (8, 6), "matmul"),
    ],
)
def test_a_product_of_rows_and_one_stored_matrix_is_quantized(
    equation: str, shape: tuple[int, int], pattern: str
) -> None:
    record = decisions(model(equation, *shape), torch.randn(5, 8))["einsum"]
    assert (record.outcome, record.pattern) == ("quantized", pattern)


@pytest.mark.parametrize("config", [STATIC, PER_TOKEN, WEIGHT_ONLY], ids=["static", "per token", "weight only"])
def test_it_runs_on_the_kernels_of_linears(config: object) -> None:
    """`run_stages` compares the kernel with the einsum of the q/dq graph, and the prepared model with the float one."""
    found = run_stages(model("bsi,oi->bso", 6, 8), torch.randn(2, 5, 8), config=config)  # type: ignore[arg-type]
    linear = run_stages(Do(lambda m, x: m.fc(x), fc=nn.Linear(8, 6, bias=False)), torch.randn(2, 5, 8), config=config)  # type: ignore[arg-type]
    assert kernel_names(found.lowered) == kernel_names(linear.lowered) != []


@pytest.mark.parametrize(
    ("equation", "shape", "left"),
    [
        ("ib,oi->bo", (6, 5), False),  # sums over the rows
        ("bi,oi->ob", (6, 8), False),  # transposes the result
        ("bi,oi->b", (6, 8), False),  # sums the result
        ("bi,bi->bi", (5, 8), False),  # element by element
        ("bi,eoi->beo", (2, 6, 8), False),
        ("oi,bi->bo", (6, 8), True),
        ("bi,oi->bo", (6, 1), False),  # broadcasts where a linear would refuse
    ],
)
def test_any_other_stays_in_float_and_says_so(equation: str, shape: tuple[int, ...], left: bool) -> None:
    record = decisions(model(equation, *shape, left=left), torch.randn(5, 8))["einsum"]
    size = 4 * torch.Size(shape).numel()
    assert (record.outcome, record.reason, record.asked) == ("float", OF_WEIGHTS[EINSUM], True)
    assert record.float_bytes == size


def test_an_einsum_of_two_activations_is_nobodys_weight() -> None:
    found = decisions(Do(lambda m, x: torch.einsum("bi,ci->bc", x, x)), torch.randn(5, 8))["einsum"]
    assert (found.outcome, found.asked, found.float_bytes) == ("float", True, 0)
