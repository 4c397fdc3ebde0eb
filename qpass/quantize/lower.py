"""Lowering: q/dq pairs become the target's kernels, exactly."""

from __future__ import annotations

from torch import fx

from qpass.errors import LowerError, StrictError
from qpass.ir.module import Draft, copy_graph_module, rebuild
from qpass.ir.pipeline import Pipeline, without_gc
from qpass.ir.record import graph_record, record_of
from qpass.ir.regions import regions
from qpass.quantize.pipelines import lower_pipeline, refuse_misfit, target_of
from qpass.targets import Target, get


@without_gc()
def lower_graph(
    quantized: fx.GraphModule, target: str | Target = "", strict: bool = False, pipeline: Pipeline | None = None
) -> fx.GraphModule:
    """A lowered copy of a quantized graph; weights that no kernel packs are shared with it.

    ``pipeline`` is run instead of the standard one.

    Raises:
        LowerError: the graph is not at the quantized stage.
        StrictError: ``strict`` and some quantized operation has no kernel.
    """
    record = graph_record(quantized)
    if record.stage != "quantized":
        what = f"lower takes a quantized graph, and this one is {record.stage}"
        raise LowerError(what, hint="call qpass.convert first")
    chosen = get(target or target_of(pipeline) or record.target or "x86")
    if pipeline is None:
        pipeline = lower_pipeline(chosen)
    refuse_misfit(pipeline, "lowered", target=chosen)
    gm = copy_graph_module(quantized, Draft)
    graph_record(gm).target = chosen.name
    pipeline.run(gm)
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
