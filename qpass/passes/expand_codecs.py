"""Write codecs out, for the compiler to fuse them with what stands around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from qpass.graph.edit import Editor, fake_mode_of
from qpass.ops.comm import FORMULAS
from qpass.passes.frame import Pass


@dataclass(frozen=True)
class ExpandCodecs(Pass):
    """``encode(x), decode(p), decode_reduce(p)  ->  their arithmetic in ATen``, as far as Inductor takes it; exact."""

    def run(self, gm: fx.GraphModule) -> int:
        from torch._inductor.decomposition import select_decomp_table

        edit, table, mode = Editor(gm, self.name), select_decomp_table(), fake_mode_of(gm.graph)
        found = [node for node in gm.graph.nodes if node.op == "call_function" and node.target in FORMULAS]
        for node in found:
            x, *rest = node.args
            assert mode is not None
            with mode, torch.no_grad():
                body = make_fx(_of_one(FORMULAS[node.target], rest), decomposition_table=table)(x.meta["val"]).graph
            body.eliminate_dead_code()
            node.replace_all_uses_with(edit.splice(body, [x], like=node, before=node))
            gm.graph.erase_node(node)
        return len(found)


def _of_one(formula: Callable[..., torch.Tensor], rest: Sequence[Any]) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: formula(x, *rest)
