"""Say of a q/dq graph that was traced anew what ``prepare`` once said of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from qpass.ir.attributes import get_constant
from qpass.ir.constants import Constants
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.record import FUSED_INTO, describe, record_of, set_record
from qpass.islands.float_weights import FloatWeights, reads
from qpass.islands.island import IslandMatch, quantized_operands
from qpass.islands.qdq import as_dequantize, as_quantize
from qpass.patterns import CATALOGUE
from qpass.quantize.passes.annotate import uncovered
from qpass.targets import Target

CONVERTED_IN_FLOAT = "it has no q/dq pair: it was left in float when the model was converted"


@dataclass(frozen=True)
class RecogniseIslands(Pass):
    """``linear(dq(x), dq(w))  ->  the same, recorded as a quantized linear``; all else is recorded as float

    A trace by Dynamo keeps no record. What was quantized is read off the graph; why the rest was not is lost.
    """

    target: Target
    weights: FloatWeights = field(default_factory=FloatWeights, compare=False)

    def run(self, gm: fx.GraphModule) -> PassResult:
        constants = Constants(gm)
        taken: set[fx.Node] = set()
        count = 0
        for node in gm.graph.nodes:
            if node.op != "call_function" or node in taken or node in constants or record_of(node) is not None:
                continue
            if as_dequantize(node) is not None or as_quantize(node) is not None:
                continue
            self._visit(node, taken)
            count += 1
        self.weights.count(gm)
        for read in reads(gm, constants):
            kept = self.weights.take(gm, read)
            if (record := record_of(read.reader)) is not None:
                set_record(read.reader, record.but(float_bytes=record.float_bytes + kept))
        return PassResult(count)

    def _visit(self, node: fx.Node, taken: set[fx.Node]) -> None:
        covered = ""
        for island in self.target.islands(CATALOGUE):
            matches = list(island.matches(node, self.target.fusions(island) or {()}, taken))
            quantized = next((m for m in matches if quantized_operands(m)), None)
            if quantized is not None:
                taken.update(quantized.nodes)
                _record(quantized)
                return
            covered = covered or (island.name if matches and type(island) not in self.target.only_behind else "")
        found = uncovered(node)
        if found.outcome == "float" and covered:
            found = found.but(pattern=covered, reason=CONVERTED_IN_FLOAT)
        set_record(node, found)


def float_bytes(graphs: Iterable[fx.GraphModule]) -> int:
    """Bytes of the constants that the float model had: codes count as what they stand for, qparams not at all."""
    sizes: dict[str, int] = {}
    for gm in graphs:
        pairs = [pair for node in gm.graph.nodes if (pair := as_dequantize(node) or as_quantize(node)) is not None]
        qparams = {id(value) for pair in pairs for value in (pair.qparams.scale, pair.qparams.zero_point)}
        codes = {id(pair.value): pair.node.meta["val"].element_size() for pair in pairs}
        for node in gm.graph.find_nodes(op="get_attr"):
            value = get_constant(gm, str(node.target))
            if isinstance(value, Tensor) and value.layout == torch.strided and id(node) not in qparams:
                size = value.numel() * codes.get(id(node), value.element_size())
                place = f"address {value.data_ptr()}" if value.data_ptr() else f"object {id(value)}"
                sizes[place] = max(size, sizes.get(place, 0))
    return sum(sizes.values())


def _record(m: IslandMatch) -> None:
    name = m.island.name
    set_record(m.root, describe(m.root, "quantized", name))
    for _, fused in m.epilogues:
        set_record(fused.root, describe(fused.root, "quantized", name, reason=f"{FUSED_INTO}{m.root.name}"))
