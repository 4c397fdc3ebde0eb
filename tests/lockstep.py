"""Graphs with collectives, built without a process group, and all their ranks run in one process, node by node."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from qpass.graph.text import graph_text
from qpass.rewrite.collective import EVEN_KEY, WORLD_KEY, ops
from qpass.rewrite.match import normalized
from qpass.rewrite.rule import Applied, Rule, apply_rules


def traced(function: Callable[..., Any], *inputs: Tensor, world: int = 2) -> fx.GraphModule:
    """``function`` as a graph of ATen and functional collectives, of ``inputs`` and for a group of that size."""
    mode = FakeTensorMode()
    with mode:
        gm = make_fx(lambda *given: function(*given))(*(mode.from_tensor(x) for x in inputs))
    for node in gm.graph.nodes:
        node.meta[WORLD_KEY] = world
        node.meta[EVEN_KEY] = True
        node.meta["stack_trace"] = '  File "model.py", line 7, in forward\n    y = send(x)\n'
        node.meta["nn_module_stack"] = {"m": ("L['self'].block", torch.nn.Module)}
    return gm


def applied(gm: fx.GraphModule, *rules: Rule) -> Applied:
    """What the rules did to ``gm``, whose dead code is gone then."""
    done = apply_rules(gm, rules, "test")
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    return done


def text(gm: fx.GraphModule) -> list[str]:
    """The graph's lines, without its inputs; nodes are named by their operator and numbered from the top."""
    counts: Counter[str] = Counter()
    names = {}
    for node in gm.graph.nodes:
        short = "x" if node.op == "placeholder" else getattr(node.target, "__name__", "output").split(".")[0]
        names[node.name] = f"{short}_{counts[short]}" if counts[short] else short
        counts[short] += 1
    whole = re.sub(r"\w+", lambda word: names.get(word[0], word[0]), graph_text(gm))
    lines = whole.replace("_c10d_functional.", "").replace("qpass.", "").splitlines()
    return [line for line in lines if not line.endswith("= input")]


def lockstep(gm: fx.GraphModule, ranks: Sequence[Sequence[Tensor]]) -> list[Any]:
    """The result of every rank; ``ranks`` are the inputs of each. Every ``val`` is held against what was computed."""
    everyone: list[dict[fx.Node, Any]] = [{} for _ in ranks]
    for index, node in enumerate(gm.graph.nodes):
        if node.op == "output":
            return [fx.node.map_arg(node.args[0], env.__getitem__) for env in everyone]
        if node.op == "placeholder":
            results = [inputs[index] for inputs in ranks]
        elif node.target in _COLLECTIVES:
            given = [fx.node.map_arg(normalized(node), env.__getitem__) for env in everyone]
            results = _COLLECTIVES[node.target]([each["input"] for each in given], given[0])
        else:
            given = [fx.node.map_arg((node.args, node.kwargs), env.__getitem__) for env in everyone]
            results = [node.target(*args, **kwargs) for args, kwargs in given]
        for env, result in zip(everyone, results, strict=True):
            for val, part in zip(tree_leaves(node.meta["val"]), tree_leaves(result), strict=True):
                assert (val.shape, val.dtype) == (part.shape, part.dtype), node.format_node()
            env[node] = result
    raise AssertionError("a graph without an output")


def value(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The input of a rank: values of many sizes."""
    generator = torch.Generator().manual_seed(rank + 1)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()).to(dtype)


def _all_reduce(xs: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    total = functools.reduce(torch.add, xs)
    return [total / len(xs) if given["reduce_op"] == "avg" else total for _ in xs]


def _all_to_all(xs: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
    sent = [x.split(given["input_split_sizes"]) for x in xs]
    return [torch.cat(parts) for parts in zip(*sent, strict=True)]


_COLLECTIVES: dict[Any, Callable[[list[Tensor], dict[str, Any]], list[Tensor]]] = {
    ops.all_gather_into_tensor.default: lambda xs, given: [torch.cat(xs) for _ in xs],
    ops.all_reduce.default: _all_reduce,
    ops.all_to_all_single.default: _all_to_all,
    ops.broadcast.default: lambda xs, given: [xs[given["src"]] for _ in xs],
    ops.reduce_scatter_tensor.default: lambda xs, given: list(_all_reduce(xs, given)[0].chunk(len(xs))),
}


def wait(x: Tensor) -> Tensor:
    return ops.wait_tensor(x)


def all_gather(x: Tensor, world: int = 2) -> Tensor:
    return wait(ops.all_gather_into_tensor(x, world, "0"))


def all_reduce(x: Tensor, op: str = "sum") -> Tensor:
    return wait(ops.all_reduce(x, op, "0"))


def all_to_all(x: Tensor, world: int = 2, splits: list[int] | None = None) -> Tensor:
    splits = splits or [x.shape[0] // world] * world
    return wait(ops.all_to_all_single(x, splits, splits, "0"))


def broadcast(x: Tensor, src: int = 0) -> Tensor:
    return wait(ops.broadcast(x, src, "0"))


def reduce_scatter(x: Tensor, op: str = "sum", world: int = 2) -> Tensor:
    return wait(ops.reduce_scatter_tensor(x, op, world, "0"))


def coded(x: Tensor, form: str = "int8:128:bf16") -> Tensor:
    """``decode(encode(x))`` in the shape of ``x``."""
    payload = torch.ops.qpass.encode(x, form)
    return torch.ops.qpass.decode(payload, x.numel(), x.dtype, form).view(x.shape)
