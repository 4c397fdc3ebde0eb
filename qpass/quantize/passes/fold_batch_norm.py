"""Fold the batch norms that ``annotate`` recorded into the convolutions before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.ir.attributes import free_name, get_constant
from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import normalized, set_arguments
from qpass.quantize.passes.annotate import FOLD
from qpass.quantize.passes.insert_observers import is_trained
from qpass.spec.observers import observer_for

aten = torch.ops.aten


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """``batch_norm(conv(x, w, b))  ->  conv(x, w * f, (b - mean) * f + bias)`` with ``f = weight / sqrt(var + eps)``

    Every convolution gets constants of its own, written as expressions over the model's parameters, so a weight
    that is shared by two convolutions is folded separately into each and the parameters themselves stay as they are.
    An observer of the weight is replaced by a fresh one of the product, unless training has fitted it to that already.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        found = [node for node in gm.graph.nodes if node.meta.pop(FOLD, False)]
        for node in found:
            self._fold(node, edit)
        return PassResult(len(found))

    def _fold(self, bn: fx.Node, edit: Editor) -> None:
        given = normalized(bn)
        conv = given["input"]
        arguments = normalized(conv)
        observed, bias = arguments["weight"], arguments["bias"]
        is_observed = observed.op == "call_module"
        weight = observed.args[0] if is_observed else observed
        place = {"like": conv, "before": conv}

        factor = edit.call(aten.add.Scalar, given["running_var"], given["eps"], **place)
        factor = edit.call(aten.rsqrt.default, factor, **place)
        if given["weight"] is not None:
            factor = edit.call(aten.mul.Tensor, factor, given["weight"], **place)
        mean = given["running_mean"]
        shift = edit.call(aten.neg.default, mean, **place) if bias is None else edit.call(
            aten.sub.Tensor, bias, mean, **place)  # fmt: skip
        shift = edit.call(aten.mul.Tensor, shift, factor, **place)
        if given["bias"] is not None:
            shift = edit.call(aten.add.Tensor, shift, given["bias"], **place)
        broadcast = edit.call(aten.reshape.default, factor, [-1] + [1] * (weight.meta["val"].dim() - 1), **place)
        folded = edit.call(aten.mul.Tensor, weight, broadcast, **place)
        if is_observed:
            observer: Any = get_constant(edit.gm, observed.target)
            name = str(observed.target)
            if not is_trained(observer):
                name = free_name(edit.gm, f"{observed.target}_folded")
                edit.gm.add_module(name, observer_for(observer.spec))
            folded = edit.module(name, folded, val=folded.meta.get("val"), **place)
        set_arguments(conv, weight=folded, bias=shift)
        bn.replace_all_uses_with(conv)
