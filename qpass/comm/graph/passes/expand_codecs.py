"""ExpandCodecs writes codecs out in ATen, so that the compiler fuses them with the operations around them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from qpass.comm.wire.operators import FORMULAS
from qpass.ir.editor import Editor
from qpass.ir.fake import fake_mode_of
from qpass.ir.graph_pass import Pass, PassResult


@dataclass(frozen=True)
class ExpandCodecs(Pass):
    """``encode(x), decode(p), decode_reduce(p)  ->  their arithmetic in ATen``, as far as Inductor takes it; exact."""

    def run(self, gm: fx.GraphModule) -> PassResult:
        from qpass.torch_private import select_decomp_table

        edit, table, mode = Editor(gm, self.name), select_decomp_table(), fake_mode_of(gm.graph)
        found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in FORMULAS]
        for node in found:
            inputs = node.all_input_nodes
            assert mode is not None
            with mode, torch.no_grad():
                trace = make_fx(_of_nodes(FORMULAS[node.target], node.args, inputs), decomposition_table=table)
                body = trace(*(each.meta["val"] for each in inputs)).graph
            body.eliminate_dead_code()
            node.replace_all_uses_with(edit.splice(body, inputs, like=node, before=node))
            gm.graph.erase_node(node)
        return PassResult(len(found))


def _of_nodes(
    formula: Callable[..., torch.Tensor], args: tuple[Any, ...], inputs: list[fx.Node]
) -> Callable[..., torch.Tensor]:
    """The formula as a function of the nodes among its arguments: tensors, and sizes that are symbolic."""

    def function(*given: Any) -> torch.Tensor:
        values = dict(zip(inputs, given, strict=True))
        return formula(*fx.node.map_arg(args, values.__getitem__))

    return function
