"""The written spec of each stage, checked between passes.

captured   float ATen, constants as ``get_attr``, fake values on every tensor node; for training a `Branch`
prepared   + calls of modules: of each `Observer`, and of what training changes, a `TrainingModule`
quantized  no observer left; ``quantized_decomposed`` ops with positive, finite scales and zero points in range
lowered    + kernels of a target; no other new operator
"""

from __future__ import annotations

import math

from torch import fx

from qpass import torch_private
from qpass.errors import VerifyError
from qpass.ir.observer import is_observer
from qpass.ir.record import Stage
from qpass.ir.regions import regions
from qpass.ir.source import where
from qpass.ir.text import target_name
from qpass.ir.training_modules import TrainingModule


def verify(gm: fx.GraphModule, stage: Stage) -> None:
    """Raise :class:`VerifyError`, naming the node, when ``gm`` or one of its regions breaks the spec of ``stage``."""
    for region in regions(gm):
        region.graph.lint()
        for node in region.graph.nodes:
            fault = _fault(node, stage)
            if fault:
                raise VerifyError(
                    f"the {stage} graph is not valid: {node.name} ({target_name(node)}) {fault}", where=where(node)
                )


def _fault(node: fx.Node, stage: Stage) -> str:
    if node.op == "call_method":
        return "is a method call, and the graph holds operators only"
    if node.op == "call_module":
        if stage == "captured" and is_by_mode(node):
            return ""
        if stage != "prepared":
            return f"calls a sub-module, and a {stage} graph calls none"
        if is_observer(node) or is_by_mode(node):
            return ""
        return "calls a sub-module that is neither an observer nor one of qpass.ir.training_modules"
    if node.op != "call_function" or not isinstance(node.target, torch_private.OpOverload):
        return ""
    namespace = node.target.namespace
    if namespace == "quantized_decomposed":
        return "appears before convert" if stage in ("captured", "prepared") else _qparams_fault(node)
    if stage in ("captured", "prepared") and namespace == "onednn":
        return "is a kernel of a target, and nothing is lowered yet"
    if "val" not in node.meta and node.target._schema.returns:
        return 'has no meta["val"]'
    return ""


def is_by_mode(node: fx.Node) -> bool:
    """Whether a node calls what training changes."""
    owner = node.graph.owning_module
    return (
        node.op == "call_module"
        and owner is not None
        and isinstance(owner.get_submodule(str(node.target)), TrainingModule)
    )


def _qparams_fault(node: fx.Node) -> str:
    arguments = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False))  # type: ignore[union-attr]
    arguments.update(node.kwargs)
    low, high = arguments.get("quant_min"), arguments.get("quant_max")
    scale, zero_point = arguments.get("scale"), arguments.get("zero_point")
    if isinstance(low, int) and isinstance(high, int) and low >= high:
        return f"has the empty quant range {low}..{high}"
    if isinstance(scale, float) and not (math.isfinite(scale) and scale > 0):
        return f"has the scale {scale}; scales are positive and finite"
    if isinstance(zero_point, int) and isinstance(low, int) and isinstance(high, int) and not low <= zero_point <= high:
        return f"has the zero point {zero_point} outside {low}..{high}"
    return ""
