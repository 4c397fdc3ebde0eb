from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qpass.capture.fake_dtypes import WITH_WRONG_DTYPES, correct_vals, decompose_calls


def traced(x: Tensor) -> fx.GraphModule:
    def scaled(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, zero_point = WITH_WRONG_DTYPES(x, torch.int8)
        return scale, zero_point

    return make_fx(scaled, tracing_mode="fake")(x)


def dtypes(gm: fx.GraphModule) -> list[torch.dtype]:
    return [val.meta["val"].dtype for val in gm.graph.output_node().args[0]]


def test_vals_become_what_the_operator_returns() -> None:
    x = torch.randn(3, 8)
    gm = traced(x)
    real = [result.dtype for result in gm(x)]
    assert dtypes(gm) != real  # torch's shape function is wrong; where it no longer is, this file can go
    assert correct_vals(gm) == 1
    assert dtypes(gm) == real == [torch.float32, torch.float32]


def test_spelled_out_it_computes_the_same() -> None:
    x = torch.randn(3, 8)
    gm = traced(x)
    expected = gm(x)
    assert decompose_calls(gm) == 1
    assert all(torch.equal(a, b) for a, b in zip(gm(x), expected, strict=True))
    assert decompose_calls(gm) == correct_vals(gm) == 0
