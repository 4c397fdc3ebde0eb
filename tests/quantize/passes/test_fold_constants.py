from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from interpret import operators
from pass_run import run_once
from pipeline_run import Do, run_stages
from qpass.capture.export import capture
from qpass.ir.origins import derived_constants
from qpass.quantize.passes.fold_constants import FoldConstants


def captured(function: Callable[..., Any]) -> tuple[fx.GraphModule, Tensor]:
    model = Do(function, w=nn.Parameter(torch.randn(4, 4)), v=nn.Parameter(torch.randn(4)))
    return capture(model, (torch.randn(3, 4),)), torch.randn(3, 4)


def test_the_outermost_expressions_become_constants() -> None:
    gm, x = captured(lambda m, x: x @ (m.w * m.v).t() + torch.sin(m.v))
    before = gm(x)
    assert (
        operators(gm)
        == """\
inputs_0 = input
mul = mul.Tensor(w, v)
t = t(mul)
matmul = matmul(inputs_0, t)
sin = sin(v)
add = add.Tensor(matmul, sin)
return [add]"""
    )
    assert run_once(FoldConstants(), gm, x) == 2
    assert (
        operators(gm)
        == """\
inputs_0 = input
matmul = matmul(inputs_0, folded)
add = add.Tensor(matmul, folded_1)
return [add]"""
    )
    assert torch.equal(gm(x), before)


def test_equal_expressions_become_one_constant() -> None:
    gm, x = captured(lambda m, x: x @ (m.w * m.v).t() + x @ (m.w * m.v).t() + x @ (m.w * m.v))
    before = gm(x)
    assert run_once(FoldConstants(), gm, x) == 3
    assert [node.target for node in gm.graph.find_nodes(op="get_attr")] == ["folded", "folded", "folded_1"]
    assert torch.equal(gm(x), before)


def test_how_they_follow_from_the_parameters_is_remembered() -> None:
    gm, x = captured(lambda m, x: x @ (m.w * m.v).t())
    run_once(FoldConstants(), gm, x)
    derived = derived_constants(gm)["folded"]
    w, v = torch.randn(4, 4), torch.randn(4)
    assert derived.sources == ("w", "v")
    assert torch.equal(derived.compute(w, v), (w * v).t())


def test_an_expression_that_is_also_read_on_its_own_is_kept() -> None:
    gm, x = captured(lambda m, x: x @ (c := m.w * m.v) + c.sum())
    assert run_once(FoldConstants(), gm, x) == 2
    assert operators(gm).splitlines()[1:] == [
        "matmul = matmul(inputs_0, folded)",
        "add = add.Tensor(matmul, folded_1)",
        "return [add]",
    ]


def test_codes_are_never_multiplied_out_again() -> None:
    r = run_stages(nn.Linear(4, 4), torch.randn(3, 4))
    assert FoldConstants().run(r.quantized).changed == 0
    assert "dequantize_per_channel(codes(weight)" in operators(r.quantized)


def test_an_expansion_is_not_stored() -> None:
    gm, x = captured(lambda m, x: x + (2 * m.v).expand(3, -1))
    assert run_once(FoldConstants(), gm, x) == 1
    assert operators(gm).splitlines()[1] == "expand = expand(folded, [3, -1])"


def test_random_numbers_are_drawn_each_time() -> None:
    gm, x = captured(lambda m, x: x + torch.bernoulli(m.v.sigmoid()))
    assert run_once(FoldConstants(), gm, x) == 1
    assert operators(gm).splitlines()[1] == "bernoulli = bernoulli(folded)"


def test_results_that_are_not_tensors_stay() -> None:
    gm, x = captured(lambda m, x: x @ m.w.split(2)[0].t())
    assert run_once(FoldConstants(), gm, x) == 1
    assert operators(gm).splitlines()[1] == "matmul = matmul(inputs_0, folded)"


def test_a_view_of_a_parameter_is_left_where_it_is() -> None:
    gm, x = captured(lambda m, x: x @ m.w.t() + m.v.view(2, 2).t().reshape(4) + m.v.to(torch.float64))
    before = gm(x)
    assert run_once(FoldConstants(), gm, x) == 2  # the reshape copies, and so does the cast
    assert operators(gm).splitlines()[1:3] == ["t = t(w)", "matmul = matmul(inputs_0, t)"]
    assert sorted(derived_constants(gm)) == ["folded", "folded_1"]
    assert torch.equal(gm(x), before)
