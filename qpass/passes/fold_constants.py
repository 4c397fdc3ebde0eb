"""Compute constant expressions once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qpass.graph.constants import Constants, Derived, derived_constants, expression
from qpass.graph.edit import Editor, free_name
from qpass.graph.source import module_path
from qpass.passes.frame import Pass
from qpass.rewrite.qdq import DEQUANTIZE

_GROWS = {*DEQUANTIZE, torch.ops.aten.expand.default}


@dataclass(frozen=True)
class FoldConstants(Pass):
    """``f(parameter)  ->  constant``, for the outermost such expressions; how it was derived is remembered

    Dequantization of stored codes is an expression too, but is never folded: it would store the float weight again.
    """

    def run(self, gm: fx.GraphModule) -> int:
        constants, edit = Constants(gm), Editor(gm, self.name)
        stays: set[fx.Node] = set()
        count = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node not in constants:
                continue
            if node.target in _GROWS or any(source in stays for source in node.all_input_nodes):
                stays.add(node)
                continue
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            if all(user in constants and user.target not in _GROWS for user in node.users):
                continue  # an inner part of a larger expression
            names, compute = expression(node)
            value = constants.value(node)
            name = free_name(gm, f"{module_path(node)}.folded".lstrip("."))
            derived_constants(gm)[name] = Derived(names, compute)
            node.replace_all_uses_with(edit.constant(name, value, like=node, before=node))
            count += 1
        return count
