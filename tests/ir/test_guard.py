from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim, export

from qpass.ir.guard import guard_inputs
from qpass.ir.text import graph_text
from qpass.ir.verify import verify


class Scaled(nn.Module):
    def forward(self, x: Tensor, *, times: int = 2, mode: str = "sum", mask: Tensor | None = None) -> Tensor:
        if x.shape[0] > 8:
            return x * times + 1
        return x * times


def guarded(excluded: bool = False) -> fx.GraphModule:
    shapes = {"x": {0: Dim.AUTO}, "times": None, "mode": None, "mask": None}
    program = export(
        Scaled(), (torch.randn(4, 3, 5),), {"times": 3, "mode": "sum", "mask": None}, dynamic_shapes=shapes
    )
    gm = program.module(check_guards=False)
    gm = fx.GraphModule(gm, gm.graph)  # without torch's own checks
    symbol = gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0].node.expr
    guard_inputs(gm, program.range_constraints, [(symbol, 1)] if excluded else [])
    gm.recompile()
    verify(gm, "captured")
    return gm


def test_the_assumptions_stand_at_the_head_of_the_graph() -> None:
    text = graph_text(guarded()).splitlines()
    assert text[4:7] == [
        "sym_size_int = sym_size.int(x, 1)",
        "sym_size_int_1 = sym_size.int(x, 2)",
        "eq = eq([sym_size_int, sym_size_int_1], [3, 5])",
    ]
    assert text[-2:] == ["mul = mul.Tensor(x, 3)", "return [mul]"]


@pytest.mark.parametrize("compile_", [lambda gm: gm, lambda gm: torch.compile(gm, backend="eager", dynamic=True)])
@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ((4, 3, 6), {}, "input 'x' must have the sizes [any, 3, 5] that the model was captured for"),
        ((9, 3, 5), {}, "dimension 0 of input 'x' must be at most 8: the graph holds for that"),
        ((1, 3, 5), {}, "dimension 0 of input 'x' must be other than 1: the graph holds for that"),
        ((4, 3, 5), {"times": 4}, "input 'times' was 3 when the model was captured, and the graph holds that"),
        ((4, 3, 5), {"mode": "mean"}, "input 'mode' was 'sum' when the model was captured, and the graph holds that"),
        ((4, 3, 5), {"mask": torch.ones(3)}, "input 'mask' was None when the model was captured"),
    ],
)
def test_another_input_is_refused(
    compile_: Callable[[Any], Any], inputs: tuple[int, ...], options: dict[str, Any], message: str
) -> None:
    gm = compile_(guarded(excluded=True))
    with pytest.raises(RuntimeError, match=re.escape(message)):  # Dynamo wraps it in a kind of RuntimeError
        gm(torch.randn(inputs), **{"times": 3, "mode": "sum", "mask": None, **options})


def test_another_dtype_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Expected: Float, Got: double"):
        guarded()(torch.randn(4, 3, 5, dtype=torch.float64), times=3, mode="sum", mask=None)


@pytest.mark.parametrize("backend", [None, "eager", "inductor"])
def test_every_batch_in_range_is_accepted(backend: str | None) -> None:
    gm: Any = guarded()
    gm = torch.compile(gm, backend=backend) if backend else gm
    for batch in (4, 8, 1, 2):
        x = torch.randn(batch, 3, 5)
        assert torch.equal(gm(x, times=3, mode="sum", mask=None), x * 3)
