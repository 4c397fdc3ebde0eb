"""Epilogues alone: which operations each stands for. What kernels make of them is tested with the islands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline_run import Do
from qpass.capture.export import capture
from qpass.islands.island import Epilogue
from qpass.patterns import epilogues

SPELLINGS: list[tuple[Epilogue, Callable[[Any, Tensor], Tensor], dict[str, Any]]] = [
    (epilogues.relu, lambda m, y: F.relu(y), {}),
    (epilogues.relu, lambda m, y: y.relu_(), {}),
    (epilogues.gelu, lambda m, y: F.gelu(y), {"approximate": "none"}),
    (epilogues.gelu, lambda m, y: F.gelu(y, approximate="tanh"), {"approximate": "tanh"}),
    (epilogues.silu, lambda m, y: F.silu(y), {}),
    (epilogues.hardswish, lambda m, y: F.hardswish(y), {}),
    (epilogues.relu6, lambda m, y: F.relu6(y), {}),
    (epilogues.relu6, lambda m, y: F.hardtanh(y, -2.0, 3.0), {"low": -2.0, "high": 3.0}),
    (epilogues.add, lambda m, y: y + m.other, {}),
    (epilogues.add, lambda m, y: m.other + y, {}),
]


def root_of(function: Callable[[Any, Tensor], Tensor]) -> tuple[Any, Any]:
    """The first operation behind ``sin(x)`` and the operation ``sin(x)`` itself."""
    gm = capture(Do(lambda m, x: function(m, torch.sin(x)), other=nn.Parameter(torch.ones(4, 4))), (torch.randn(4, 4),))
    (y,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    return next(iter(y.users)), y


@pytest.mark.parametrize(("epilogue", "function", "captures"), SPELLINGS)
def test_an_epilogue_matches_behind_its_result(
    epilogue: Epilogue, function: Callable[[Any, Tensor], Tensor], captures: dict[str, Any]
) -> None:
    root, y = root_of(function)
    m = epilogue.matcher.match(root, {"y": y})
    assert m is not None
    assert {name: value for name, value in m.captures.items() if name not in ("y", "other")} == captures


@pytest.mark.parametrize("function", [lambda m, y: torch.add(y, m.other, alpha=2), lambda m, y: y - m.other])
def test_a_scaled_sum_is_not_a_residual(function: Callable[[Any, Tensor], Tensor]) -> None:
    root, y = root_of(function)
    assert epilogues.add.matcher.match(root, {"y": y}) is None


def test_only_batch_norm_in_evaluation_folds() -> None:
    gm = capture(Do(lambda m, x: m.norm(torch.sin(x)), norm=nn.BatchNorm2d(3)).eval(), (torch.randn(2, 3, 4, 4),))
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.batch_norm.default)
    found = epilogues.batch_norm.matcher.match(node, {"y": node.args[0]})
    assert found is not None
    assert found.eps == 1e-5
    training = 5
    node.update_arg(training, True)
    assert epilogues.batch_norm.matcher.match(node, {"y": node.args[0]}) is None
