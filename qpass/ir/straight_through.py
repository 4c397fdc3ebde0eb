"""A quantized graph with gradients: straight through rounding, as fake-quantize modules pass them.

torch's ``quantized_decomposed`` operators, which a quantized graph is made of, have no gradients. Where one is asked
for, their twins of `qpass.ops.quantized_decomposed` run in their place: the same values, and

    d value / d x = 1 where x lies within the range, 0 where it was clamped

while scales that are computed from a batch are constants to the gradient.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass import torch_private
from qpass.errors import InputError
from qpass.ir.gradient import DETACH
from qpass.ir.record import graph_record
from qpass.ir.regions import regions
from qpass.torch_private import tree_leaves, tree_map_only

NAMESPACE = "quantized_decomposed"


class StraightThrough(nn.Module):
    """Stands for a quantized graph module in one call that asks for gradients, with its hooks."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__()
        self.__dict__ = gm.__dict__ | {"_quantized": gm}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        gm: Any = self._quantized
        bound = inspect.signature(gm.forward).bind(*args, **kwargs)
        bound.apply_defaults()
        return _Interpreter(gm).run(*bound.arguments.values())


class _Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        twin = differentiable_twin(target)
        if chooses(target):
            args = tree_map_only(Tensor, Tensor.detach, args)
        return super().call_function(twin or target, args, kwargs)


def wants_gradients(gm: fx.GraphModule, args: Any, kwargs: Any) -> bool:
    """Whether a call of ``gm`` outside compilers needs `StraightThrough`.

    Raises:
        InputError: the graph is lowered, and int8 kernels have no gradients.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    stage = graph_record(gm).stage
    if stage not in ("quantized", "lowered"):
        return False
    tensors = [*tree_leaves((args, kwargs)), *gm.parameters()]
    if not any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors):
        return False
    if stage == "lowered":
        raise InputError(
            "a lowered model has no gradients, and this call asks for them: an input or a parameter requires one",
            hint="call it under torch.no_grad(), or call the converted model, whose gradients pass straight through",
        )
    return True


def make_differentiable(gm: fx.GraphModule) -> int:
    """Put the differentiable twins into a graph that will be compiled; the number of operators replaced."""
    count = 0
    for region in regions(gm):
        for node in list(region.graph.nodes):
            twin = differentiable_twin(node.target)
            if twin is None:
                continue
            if chooses(node.target):
                for source in node.all_input_nodes:
                    with region.graph.inserting_before(node):
                        node.replace_input_with(source, region.graph.call_function(DETACH, (source,)))
            node.target = twin
            count += 1
        if count:
            region.recompile()
    return count


def differentiable_twin(target: Any) -> Any:
    """The operator of qpass that stands for one of torch's ``quantized_decomposed``; None for any other target."""
    if not isinstance(target, torch_private.OpOverload) or target.namespace != NAMESPACE:
        return None
    packet = getattr(torch.ops.qpass_decomposed, target._schema.name.rpartition("::")[2])
    return getattr(packet, target._overloadname or "default")


def chooses(target: Any) -> bool:
    """Whether an operator computes scales and zero points from a tensor."""
    return differentiable_twin(target) is not None and "choose_qparams" in target._schema.name
