"""Graphs run node by node, so that a test can ask each node what it computed and whether its ``val`` told the truth."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from qpass.ir.strides import LAID_OUT
from qpass.ir.text import graph_text


class Recorder(fx.Interpreter):
    """Keeps a copy of every value, and checks that whoever reads the value later still finds it so."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        for source in (s for s in n.all_input_nodes if s.op != "get_attr"):
            found, made = tree_leaves(self.env[source]), tree_leaves(self.values[source])
            assert all(a.equal(b) for a, b in zip(found, made, strict=True) if isinstance(a, Tensor)), (
                f"{n.name} reads {source.name} after another node has written to it"
            )
        result = super().run_node(n)
        self.values[n] = result if n.op == "get_attr" else copied(result)
        return result


def values(gm: fx.GraphModule, *inputs: Tensor) -> dict[fx.Node, Any]:
    """What each node of ``gm`` computes on ``inputs``."""
    recorder = Recorder(gm)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.values


def copied(value: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), value)


def assert_true_vals(gm: fx.GraphModule, *inputs: Tensor) -> None:
    """``meta["val"]`` of every node has the dtype and shape of what the node computes on the example inputs."""
    for node, value in values(gm, *inputs).items():
        if node.op == "output" or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
            continue
        assert "val" in node.meta, f"{node.format_node()} has no val"
        promised = [(leaf.dtype, sizes(leaf)) for leaf in tree_leaves(node.meta["val"])]
        computed = [(leaf.dtype, sizes(leaf)) for leaf in tree_leaves(value)]
        assert promised == computed, node.format_node()
        if getattr(node.target, "namespace", "") == "onednn":  # Inductor takes the val's word for a kernel's strides
            val = node.meta.get(LAID_OUT, node.meta["val"])
            assert strides(val, value) == strides(value, value), node.format_node()


def strides(tensor: Tensor, like: Tensor) -> list[int]:
    """The strides of the dimensions that ``like`` has more than one index of; those of the others mean nothing."""
    return [number(stride) for stride, size in zip(tensor.stride(), like.shape, strict=True) if size > 1]


def sizes(tensor: Tensor) -> list[int]:
    return [number(size) for size in tensor.shape]


def number(size: Any) -> int:
    """A size; a symbolic one is the number that it was when the model was captured."""
    return size.node.hint if isinstance(size, torch.SymInt) else size


def operators(gm: fx.GraphModule) -> str:
    """The graph's text, abbreviated: no checks of inputs; ``s, z`` for qparams found by calibration; a stored weight as
    ``codes(w)``, or ``packed(w)`` for a kernel, its scales and zero points included; ``relu`` for ``relu_default``."""
    lines = (line for line in graph_text(gm).splitlines() if not any(f"= {check}(" in line for check in _CHECKS))
    text = "\n".join(lines)
    for pattern, short in _SHORT:
        text = re.sub(pattern, short, text)
    return text


_CHECKS = ("_assert_scalar", "_assert_tensor_metadata", "eq", "sym_size.int")
_SHORT = (
    (r"\d+\.\d{3,}(e-\d+)?, \d+(?=[,)])", "s, z"),
    (r"([\w.]+)_codes_packed(_\d+)?, [\w.]+_scale(_\d+)?, [\w.]+_zero_point(_\d+)?", r"packed(\1)"),
    (r"([\w.]+)_codes(_\d+)?, [\w.]+_scale(_\d+)?, [\w.]+_zero_point(_\d+)?", r"codes(\1)"),
    (r"_default\b|_default(?=_\d)", ""),
    (r"\bactivation_post_process_", "observer_"),
)
