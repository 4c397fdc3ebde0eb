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
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qpass.comm.graph.collective import KINDS, WORLD_KEY, ops
from qpass.comm.graph.pieces import SEND, send_pieces
from qpass.comm.wire.feedback import Feedback
from qpass.ir.match import normalized
from qpass.ir.rule import Applied, Rule, apply_rules
from qpass.ir.text import graph_text


def traced(
    function: Callable[..., Any], *inputs: Tensor, world: int = 2, dynamic: bool = False
) -> fx.GraphModule:  # fmt: skip
    """``function`` as a graph of ATen and functional collectives, of ``inputs`` and for a group of that size.

    ``dynamic``: sizes are symbolic, and numbers may be read from tensors.
    """
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True) if dynamic else None
    mode = FakeTensorMode(shape_env=shapes)
    with mode:
        gm = make_fx(lambda *given: function(*given))(*(mode.from_tensor(x) for x in inputs))
    for node in gm.graph.nodes:
        node.meta[WORLD_KEY] = world
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


def lockstep(
    gm: fx.GraphModule,
    ranks: Sequence[Sequence[Tensor]],
    feedbacks: Sequence[Feedback] | None = None,
    sent: list[tuple[str, int]] | None = None,
) -> list[Any]:
    """The result of every rank; ``ranks`` are the inputs of each. Every ``val`` is held against what was computed.

    ``feedbacks`` hold the residuals of each. ``sent`` takes the operator and bytes of every transfer of rank 0.
    """
    sent = [] if sent is None else sent
    everyone: list[dict[fx.Node, Any]] = [{} for _ in ranks]
    symbols: list[dict[Any, int]] = [{} for _ in ranks]
    for index, node in enumerate(gm.graph.nodes):
        if node.op == "output":
            return [fx.node.map_arg(node.args[0], env.__getitem__) for env in everyone]
        if node.op == "placeholder":
            results = [inputs[index] for inputs in ranks]
        elif node.target is SEND:
            given = [fx.node.map_arg(node.args, env.__getitem__) for env in everyone]
            results = _sent_in_pieces(given, feedbacks)
            kind = "all_gather" if given[0][2] == 1 else "all_to_all"
            sent += [(kind, piece.nbytes * given[0][2] // given[0][4]) for piece in results[0]]
        elif node.target in _COLLECTIVES:
            given = [fx.node.map_arg(normalized(node), env.__getitem__) for env in everyone]
            moved = [each.get("input", each.get("inputs")) for each in given]
            sent.append((KINDS.get(node.target, "list"), sum(x.nbytes for x in tree_leaves(moved[0]))))
            results = _COLLECTIVES[node.target](moved, given)
        else:
            given = [fx.node.map_arg((node.args, node.kwargs), env.__getitem__) for env in everyone]
            results = []
            for (args, kwargs), feedback in zip(given, feedbacks or [Feedback() for _ in ranks], strict=True):
                with feedback.bound():
                    results.append(node.target(*args, **kwargs))
        for env, known, result in zip(everyone, symbols, results, strict=True):
            for val, part in zip(tree_leaves(node.meta.get("val")), tree_leaves(result), strict=True):
                assert _form(val, part, known) == _form(part, part, known), node.format_node()
            env[node] = result
    raise AssertionError("a graph without an output")


def _sent_in_pieces(given: list[Any], feedbacks: Sequence[Feedback] | None) -> list[Any]:
    """What every rank receives of `send_pieces`, whose transfers are held back and done here."""
    payloads = []
    for args, feedback in zip(given, feedbacks or [Feedback() for _ in given], strict=True):
        with feedback.bound(), _Withheld():
            payloads.append(send_pieces(*args))
    _, _, parts, _, world, *_ = given[0]
    pieces = list(zip(*payloads, strict=True))
    if parts == 1:
        received = [_all_gather(list(piece), []) for piece in pieces]
    else:
        cut = [zip(*(x.chunk(world) for x in piece), strict=True) for piece in pieces]
        received = [[torch.cat(part) for part in parts_of] for parts_of in cut]
    return [list(each) for each in zip(*received, strict=True)]


class _Withheld(TorchDispatchMode):
    """Collectives return what they would send."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func in _COLLECTIVES else func(*args, **(kwargs or {}))


def _form(val: Any, computed: Any, symbols: dict[Any, int]) -> tuple[Any, ...]:
    """Shape and dtype of a value as numbers; a symbol that is met for the first time is what was computed there."""
    sizes, given = ((*x.shape,) if isinstance(x, Tensor) else (x,) for x in (val, computed))
    found = []
    for size, number in zip(sizes, given, strict=True):
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            if expression.is_symbol:
                symbols.setdefault(expression, number)
            size = int(expression.xreplace(symbols))
        found.append(size)
    return (*found, getattr(val, "dtype", None))


def value(rank: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The input of a rank: values of many sizes."""
    generator = torch.Generator().manual_seed(rank + 1)
    return (torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()).to(dtype)


Given = list[dict[str, Any]]
"""The arguments of one collective on every rank."""


def _all_gather(xs: list[Tensor], given: Given) -> list[Tensor]:
    return [torch.cat(xs) for _ in xs]


def _all_reduce(xs: list[Tensor], given: Given) -> list[Tensor]:
    total = functools.reduce(torch.add, xs)
    return [total / len(xs) if given[0]["reduce_op"] == "avg" else total for _ in xs]


def _all_to_all(xs: list[Tensor], given: Given) -> list[Tensor]:
    sent = [x.split(each["input_split_sizes"]) for x, each in zip(xs, given, strict=True)]
    received = list(zip(*sent, strict=True))
    assert [[len(part) for part in parts] for parts in received] == [each["output_split_sizes"] for each in given]
    return [torch.cat(parts) for parts in received]


def _reduce_scatter(xs: list[Tensor], given: Given) -> list[Tensor]:
    return list(_all_reduce(xs, given)[0].chunk(len(xs)))


def _each(one: Callable[[list[Tensor], Given], list[Tensor]]) -> Callable[[list[Any], Given], list[Any]]:
    """The same for a list of tensors on every rank."""
    return lambda xs, given: [list(r) for r in zip(*(one(list(x), given) for x in zip(*xs, strict=True)), strict=True)]


_COLLECTIVES: dict[Any, Callable[[list[Any], Given], list[Any]]] = {
    ops.all_gather_into_tensor.default: _all_gather,
    ops.all_gather_into_tensor_coalesced.default: _each(_all_gather),
    ops.all_reduce.default: _all_reduce,
    ops.all_reduce_coalesced.default: _each(_all_reduce),
    ops.all_reduce_coalesced_.default: _each(_all_reduce),
    ops.all_to_all_single.default: _all_to_all,
    ops.broadcast.default: lambda xs, given: [xs[given[0]["src"]] for _ in xs],
    ops.reduce_scatter_tensor.default: _reduce_scatter,
    ops.reduce_scatter_tensor_coalesced.default: _each(_reduce_scatter),
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
