from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from qpass.ir.normalize import drop_noops, eliminate_dead, functionalize_inplace

aten = torch.ops.aten


def long_graph(nodes: int) -> fx.GraphModule:
    """Linears, in-place relus and residual adds, dropouts, views and dead code."""
    root = nn.Module()
    root.weight = nn.Parameter(torch.randn(8, 8))
    graph, mode = fx.Graph(), FakeTensorMode()

    def call(target: Callable[..., object], *args: object) -> fx.Node:
        node = graph.call_function(target, args)
        with mode:
            node.meta["val"] = target(*fx.node.map_arg(args, lambda argument: argument.meta["val"]))
        return node

    weight, x = graph.get_attr("weight"), graph.placeholder("x")
    weight.meta["val"], x.meta["val"] = mode.from_tensor(root.weight), mode.from_tensor(torch.ones(4, 8))
    residual = call(aten.linear.default, x, weight)
    for _ in range(nodes // 7):
        hidden = call(aten.relu_.default, call(aten.linear.default, residual, weight))
        hidden = call(aten.view.default, call(aten.dropout.default, hidden, 0.1, False), [2, 16])
        residual = call(aten.add_.Tensor, residual, call(aten.view.default, hidden, [4, 8]))
        call(aten.sin.default, residual)
    graph.output((residual,))
    return fx.GraphModule(root, graph)


def test_time_is_linear_in_the_graph() -> None:
    def seconds(nodes: int) -> float:
        gm = long_graph(nodes)
        start = time.process_time()
        assert functionalize_inplace(gm) == 2 * (nodes // 7)
        assert drop_noops(gm) == nodes // 7
        assert eliminate_dead(gm) == nodes // 7
        return time.process_time() - start

    seconds(500)
    short = min(seconds(1000) for _ in range(3))
    # Four times the nodes: 4 is linear and 16 quadratic; 8 leaves room for caches and a busy machine.
    assert min(seconds(4000) for _ in range(3)) < 8 * short
