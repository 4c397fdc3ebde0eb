"""Lowering: q/dq pairs become the target's kernels, exactly."""

from __future__ import annotations

from torch import fx

from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.errors import LowerError, StrictError
from qpass.ir.edit import copy_graph_module, rebuild
from qpass.ir.module import Draft
from qpass.ir.pipeline import Pipeline, without_gc
from qpass.ir.record import graph_record, record_of
from qpass.ir.regions import regions
from qpass.quantize.passes.carry_codes import CarryCodes
from qpass.quantize.passes.fold_constants import FoldConstants
from qpass.quantize.passes.keep_strides import KeepStrides
from qpass.quantize.passes.lower_islands import LowerIslands
from qpass.quantize.passes.merge_siblings import MergeSiblings
from qpass.targets import Target, get


def pipeline(target: Target) -> Pipeline:
    """The passes from the quantized to the lowered stage."""
    islands = (MergeSiblings(target), LowerIslands(target, target.missing()))
    return Pipeline("lowered", (LowerCollectives(), CarryCodes(), *islands, KeepStrides(), FoldConstants()))


@without_gc()
def lower_graph(quantized: fx.GraphModule, target: str | Target = "", strict: bool = False) -> fx.GraphModule:
    """A lowered copy of a quantized graph; weights that no kernel packs are shared with it.

    Raises:
        LowerError: the graph is not at the quantized stage.
        StrictError: ``strict`` and some quantized operation has no kernel.
    """
    record = graph_record(quantized)
    if record.stage != "quantized":
        what = f"lower takes a quantized graph, and this one is {record.stage}"
        raise LowerError(what, hint="call qpass.convert first")
    gm = copy_graph_module(quantized, Draft)
    pipeline(get(target or record.target or "x86")).run(gm)
    gm = rebuild(gm)
    if strict:
        unfused = [
            f"{found.module or node.name} ({found.op}): {found.reason}"
            for region in regions(gm) for node in region.graph.nodes
            if (found := record_of(node)) is not None and found.outcome == "quantized" and not found.is_fused
        ]  # fmt: skip
        if unfused:
            raise StrictError(
                f"{len(unfused)} quantized operations have no kernel", where="\n         ".join(unfused),
                hint="leave them in float with config.keep_float(module=...), or lower without strict=True",
            )  # fmt: skip
    return gm
