"""Compute constant expressions once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qpass.ir.alias import storages
from qpass.ir.constants import Constants, expression, form
from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.origins import Derived
from qpass.ir.source import module_path
from qpass.islands.qdq import DEQUANTIZE, cast_of

_GROWS = {*DEQUANTIZE, torch.ops.aten.expand.default}


@dataclass(frozen=True)
class FoldConstants(Pass):
    """``f(parameter)  ->  constant``, for the outermost such expressions; how it was derived is remembered

    Dequantization of stored codes, or a cast of them, is an expression too, but is never folded: it would store the
    float weight again. Nor is a mere view of a parameter, which costs nothing, and whose memory would be the
    parameter's.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        constants, edit = Constants(gm), Editor(gm, self.name)
        stays: set[fx.Node] = set()
        views: set[fx.Node] = set()
        count = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node not in constants:
                continue
            if node.target in _GROWS or casts_codes(node) or any(source in stays for source in node.all_input_nodes):
                stays.add(node)
                continue
            if not isinstance(node.meta.get("val"), torch.Tensor):
                continue
            memory = set(storages(node))
            bases = [source for source in node.all_input_nodes if source.op == "get_attr" or source in views]
            if any(memory.intersection(storages(base)) for base in bases):
                views.add(node)
                continue
            if all(user in constants and user.target not in _GROWS and not casts_codes(user) for user in node.users):
                continue  # an inner part of a larger expression
            folded = edit.derived(form(node), like=node, before=node)
            if folded is None:
                names, compute = expression(node)
                name = f"{module_path(node)}.folded".lstrip(".")
                derived = Derived(names, compute, form(node))
                folded = edit.constant(name, constants.value(node), like=node, before=node, derived=derived)
            node.replace_all_uses_with(folded)
            count += 1
        return PassResult(count)


def casts_codes(node: fx.Node) -> bool:
    """Whether a node casts codes of 8 bits to a wider dtype."""
    source = cast_of(node)
    if source is None or source.meta["val"].dtype not in (torch.int8, torch.uint8):
        return False
    return bool(node.meta["val"].dtype.itemsize > 1)
