"""Put the target's kernels in the place of quantized islands."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qpass.ir.constants import Constants
from qpass.ir.editor import Editor, erase_dead
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.record import describe, record_of, set_record
from qpass.ir.rule import Refusal
from qpass.ir.strides import stand_for
from qpass.islands.island import Island, IslandMatch, quantized_operands, spec_of
from qpass.patterns import CATALOGUE
from qpass.targets import Output, Target


@dataclass(frozen=True)
class LowerIslands(Pass):
    """``q(act(linear(dq(x), dq(w), b)))  ->  qlinear(x, pack(w), b, act)``, for every island of the catalogue

    ``missing`` says why the machine has none of the target's kernels; then every island stays as it is, and says so.
    """

    target: Target
    missing: str = ""

    def run(self, gm: fx.GraphModule) -> PassResult:
        edit, constants = Editor(gm, self.name), Constants(gm)
        taken: set[fx.Node] = set()
        count = 0
        for node in list(gm.graph.nodes):
            if node.op != "call_function" or node in taken or node in constants:
                continue
            for island in self.target.islands(CATALOGUE):
                matches = list(island.matches(node, self.target.fusions(island) or {()}, taken))
                if any(quantized_operands(m) for m in matches):
                    count += self._lower(island, matches, edit, constants, taken)
                    break
        return PassResult(count)

    def _lower(
        self, island: Island, matches: list[IslandMatch], edit: Editor, constants: Constants, taken: set[fx.Node]
    ) -> int:
        root = matches[0].root
        before = record_of(root) or describe(root, "quantized", island.name)
        reason = self.missing
        for m in matches if not self.missing else []:
            try:
                island.check(m, constants)
                specs = {name: spec_of(qparams, constants) for name, qparams in quantized_operands(m).items()}
                kernel, out = self.target.kernel_for(m, specs, final=True)
            except Refusal as refusal:
                reason = refusal.reason
                continue
            done = ", ".join(filter(None, (before.reason, fused_reason(m, out), kernel.note(m))))
            result = kernel.emit(m, out, edit)
            record = before.but(outcome="lowered", kernel=kernel.name, reason=done)
            if result is m.output:
                set_record(root, record)
                taken.update(m.nodes)
                return 0
            set_record(result, record)
            stand_for(result, out.node)
            out.node.replace_all_uses_with(result)
            erase_dead(edit.graph, (out.node, *reversed(m.nodes)))
            return 1
        set_record(root, before.but(outcome="quantized", reason=reason))
        return 0


def fused_reason(m: IslandMatch, out: Output) -> str:
    """What the kernel does besides the operation itself."""
    parts = list(m.fused)
    if out.node is not m.output:
        parts.append("cast to bfloat16" if out.dtype.is_floating_point else "quantize")
    return f"with {', '.join(parts)}" if parts else ""
