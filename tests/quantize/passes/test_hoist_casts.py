from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from interpret import operators
from pass_run import run_once
from pipeline_run import Do, kernel_names, run_stages
from qpass.capture.export import capture
from qpass.presets import int8_static
from qpass.quantize.passes.hoist_casts import HoistCasts

X = torch.randn(2, 6, 8)
BFLOAT16 = int8_static(compute_dtype=torch.bfloat16)


def hoisted(function: Callable[..., Any], expected: int, **members: Any) -> fx.GraphModule:
    """The graph behind the pass, which made ``expected`` casts and changed no value."""
    gm = capture(Do(function, **members).eval(), (X,))
    before = gm(X)
    assert run_once(HoistCasts(), gm, X) == expected
    for new, old in zip(gm(X), before, strict=True):
        assert new.dtype == old.dtype
        assert torch.equal(new, old)
    return gm


def test_a_cast_goes_up_through_what_only_moves_values() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        return (torch.tanh(x).unflatten(-1, (2, 4)).transpose(1, 2).to(torch.bfloat16),)

    gm = capture(Do(forward).eval(), (X,))
    assert operators(gm).splitlines()[1:] == [
        "tanh = tanh(inputs_0)",
        "unflatten = unflatten.int(tanh, -1, [2, 4])",
        "transpose = transpose.int(unflatten, 1, 2)",
        "to = to.dtype(transpose, bfloat16)",
        "return [to]",
    ]
    assert operators(hoisted(forward, 1)).splitlines()[1:] == [
        "tanh = tanh(inputs_0)",
        "to_dtype = to.dtype(tanh, bfloat16)",
        "unflatten = unflatten.int(to_dtype, -1, [2, 4])",
        "transpose = transpose.int(unflatten, 1, 2)",
        "return [transpose]",
    ]


def test_slices_that_are_all_cast_share_one_cast() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = torch.tanh(x)
        return y[..., :4].to(torch.bfloat16), y[..., 4:].transpose(1, 2).to(torch.bfloat16)

    assert operators(hoisted(forward, 1)).count("to.dtype") == 1


def test_a_value_that_is_also_read_as_it_is_keeps_its_casts() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        y = torch.tanh(x)
        return y.transpose(1, 2).to(torch.bfloat16), y + 1

    hoisted(forward, 0)


def test_two_dtypes_and_larger_ones_stay_where_they_are() -> None:
    def two(m: Any, x: Tensor) -> Any:
        y = torch.tanh(x).transpose(1, 2)
        return y.to(torch.bfloat16), y.to(torch.float16)

    hoisted(two, 0)
    hoisted(lambda m, x: (torch.tanh(x).transpose(1, 2).double(),), 0)


def test_inputs_and_what_computes_are_not_crossed() -> None:
    hoisted(lambda m, x: (x.transpose(1, 2).to(torch.bfloat16),), 0)
    hoisted(lambda m, x: ((torch.tanh(x) * 3).to(torch.bfloat16),), 0)


def test_a_linear_behind_which_heads_are_split_writes_bfloat16_itself() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        q, k = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (m.q, m.k))
        return q @ k.transpose(-2, -1)

    r = run_stages(Do(forward, q=nn.Linear(8, 8), k=nn.Linear(8, 8)), X, config=BFLOAT16)
    assert kernel_names(r.lowered)[0] == "onednn.qlinear one GEMM, with cast to bfloat16"
