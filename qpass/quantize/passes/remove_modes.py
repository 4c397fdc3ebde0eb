"""Take out what only training does: the graph of evaluation, as it was before `InsertModes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from qpass.ir.alias import written_nodes
from qpass.ir.attributes import holder, replace_submodule
from qpass.ir.branch import Branch
from qpass.ir.editor import Editor
from qpass.ir.gradient import stopped
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.match import set_arguments
from qpass.ir.training_modules import (
    Attention,
    BatchNorm,
    Dropout,
    Flagged,
    FoldedBias,
    FoldedWeight,
    FoldFactor,
    TrainingModule,
)

aten = torch.ops.aten


@dataclass(frozen=True)
class RemoveModes(Pass):
    """``dropout_0(x)  ->  x``, ``norm(x, ...)  ->  batch_norm(x, ..., training=False)``

    A folded batch norm becomes a plain one behind a convolution of the unscaled weight, marked to be folded by
    `FoldBatchNorm` like any other; the fake-quantize of the weight keeps the scale that training gave it.
    """

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit = Editor(gm, self.name)
        found = [
            (node, module) for node in gm.graph.nodes
            if node.op == "call_module" and isinstance(module := gm.get_submodule(str(node.target)), TrainingModule)
        ]  # fmt: skip
        for node, module in found:
            plain = self._plain(node, module, edit)
            if plain is not None:
                node.replace_all_uses_with(plain)
            elif isinstance(module, FoldedBias):
                drop_bias(node)
        for node, _ in reversed(found):  # readers first
            gm.graph.erase_node(node)
        names = dict.fromkeys(str(node.target) for node, _ in found)
        for name in sorted(names, key=lambda name: -name.count(".")):  # one may stand below another
            module = gm.get_submodule(name)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                replace_submodule(gm, name, holder(module))
            else:
                gm.delete_submodule(name)
        return PassResult(len(found) + drop_detach(gm))

    def _plain(self, node: fx.Node, module: TrainingModule, edit: Editor) -> Any:
        if isinstance(module, Dropout | Branch | FoldedWeight | FoldedBias):
            return node.args[0]
        if isinstance(module, FoldFactor):
            return None
        place: dict[str, Any] = {"like": node, "before": node, "val": node.meta.get("val")}
        if isinstance(module, Attention):
            query, key, value, mask, is_causal, *rest = node.args
            plain = edit.call(
                aten.scaled_dot_product_attention.default, query, key, value, mask, 0.0, is_causal,
                scale=rest[0], enable_gqa=rest[1], **place,
            )  # fmt: skip
        elif isinstance(module, Flagged):
            plain = edit.call(module.operator, *module.with_flag(node.args, False), **place)
        else:
            assert isinstance(module, BatchNorm)
            flags = (False, module.momentum or 0.0, module.eps, False)  # as export writes it: without cuDNN
            plain = edit.call(aten.batch_norm.default, *node.args[:5], *flags, **place)
        plain.meta = {**node.meta, **plain.meta}
        return plain


def drop_detach(gm: fx.GraphModule) -> int:
    """``detach(x) -> x`` where nothing writes to x; the number dropped."""
    kept = written_nodes(gm.graph)
    dropped = [node for node in stopped(gm.graph) if node not in kept]
    for node in dropped:
        node.replace_all_uses_with(node.all_input_nodes[0])
        gm.graph.erase_node(node)
    return len(dropped)


def drop_bias(bias: fx.Node) -> None:
    """Let the convolutions that read a folded bias have none, as in the model."""
    for conv in list(bias.users):
        set_arguments(conv, bias=None)
