"""A graph as text: one line a node, stable over runs, made for reading and for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qpass import torch_private


def graph_text(gm: fx.GraphModule, *, shapes: bool = False) -> str:
    """One line per node, ``name = op(args)``; constants by their dotted name; ``shapes`` adds dtype and sizes."""
    lines = []
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            line = f"{node.name} = input"
        elif node.op == "output":
            line = f"return {_argument(node.args[0])}"
        elif node.op == "get_attr":
            continue
        else:
            arguments = [_argument(a) for a in node.args] + [f"{k}={_argument(v)}" for k, v in node.kwargs.items()]
            line = f"{node.name} = {target_name(node)}({', '.join(arguments)})"
        if shapes and isinstance(node.meta.get("val"), torch.Tensor):
            val = node.meta["val"]
            line += f"    # {str(val.dtype).removeprefix('torch.')}{[str(s) for s in val.shape]}".replace("'", "")
        lines.append(line)
    return "\n".join(lines)


def target_name(node: fx.Node) -> str:
    """``linear`` for ``aten.linear.default``, ``namespace.op`` outside ATen, with any overload but the default one."""
    target = node.target
    if isinstance(target, torch_private.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        overload = "" if target._overloadname == "default" else f".{target._overloadname}"
        prefix = "" if namespace in ("aten", "quantized_decomposed") else f"{namespace}."
        return f"{prefix}{name}{overload}"
    if isinstance(target, str):
        return target
    return getattr(target, "__name__", str(target))


def _argument(argument: Any) -> str:
    if isinstance(argument, fx.Node):
        return str(argument.target) if argument.op == "get_attr" else argument.name
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_argument, argument))}]"
    if isinstance(argument, float):
        return f"{argument:.6g}"
    if isinstance(argument, torch.dtype):
        return str(argument).removeprefix("torch.")
    return str(argument)
