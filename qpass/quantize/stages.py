"""From a captured graph to a prepared one, and from there to a quantized one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from qpass import targets
from qpass.errors import ConfigError, ConvertError, StrictError
from qpass.ir.attributes import get_constant
from qpass.ir.gradient import DETACH
from qpass.ir.module import Draft, copy_graph_module, rebuild
from qpass.ir.ownership import own_tensors
from qpass.ir.pipeline import Pipeline, without_gc
from qpass.ir.record import graph_record, record_of
from qpass.ir.regions import regions
from qpass.ir.training_modules import FoldedWeight, FoldFactor
from qpass.islands.float_weights import FloatWeights
from qpass.quantize.passes.annotate import Annotate, Seen
from qpass.quantize.pipelines import convert_pipeline, prepare_pipeline, refuse_misfit
from qpass.spec.config import Config, unmatched
from qpass.spec.fake_quantize import FakeQuantizeBase
from qpass.targets import Target


@without_gc()
def prepare_graph(
    captured: fx.GraphModule, config: Config, target: str | Target, partial: bool = False,
    pipeline: Pipeline | None = None,
) -> fx.GraphModule:  # fmt: skip
    """A prepared copy of a captured graph; weights are shared, unless they are to be trained. ``partial``: the graph
    may be a part of a model, whose other parts the overrides may mean. ``pipeline`` is run instead of the standard one.

    Raises:
        ConfigError: an override matches nothing, the target is unknown, nothing can be quantized, or the pipeline was
            made for something else.
    """
    chosen = targets.for_graph(captured, target)
    if pipeline is None:
        pipeline = prepare_pipeline(config, chosen)
    refuse_misfit(pipeline, "prepared", config, chosen)
    gm = copy_graph_module(captured, Draft)
    record = graph_record(gm)
    record.config, record.target = config, chosen.name
    record.float_bytes = constant_bytes(gm)
    weights = FloatWeights()
    steps = (replace(step, weights=weights) if isinstance(step, Annotate) else step for step in pipeline.passes)
    runs = replace(pipeline, passes=tuple(steps)).run(gm)
    record.weight_bytes, record.weight_bytes_kept = weights.total, weights.kept
    found = [each for run in runs for each in run.result.found if isinstance(each, Seen)]
    if found and not partial:
        refuse_unmatched(config, found)
    refuse_nothing_quantized(gm)
    gm = rebuild(gm)
    if config.trains:
        own_tensors(gm)
        fit_weights(gm)
    return gm


def refuse_unmatched(config: Config, found: list[Seen]) -> None:
    """Raise where an override matches nothing in any region."""
    seen = Seen()
    for each in found:
        seen.join(each)
    fault = unmatched(config, seen.overrides, seen.paths, seen.ops, seen.paths.values())
    if fault is not None:
        raise fault


def fit_weights(gm: fx.GraphModule) -> None:
    """Show each fake-quantize module of a weight the weight as it is: its qparams have their shape before a trace."""
    for region in regions(gm):
        known: dict[fx.Node, torch.Tensor | None] = {}
        for node in region.graph.nodes:
            if node.op == "get_attr" and isinstance(value := get_constant(region, node.target), torch.Tensor):
                known[node] = value.detach()
            elif node.target is DETACH and node.args[0] in known:
                known[node] = known[node.args[0]]
            elif node.op == "call_module" and all(source in known for source in node.all_input_nodes):
                module = region.get_submodule(node.target)
                if isinstance(module, FakeQuantizeBase):
                    module.train()(known[node.args[0]])
                elif isinstance(module, FoldFactor | FoldedWeight):
                    with torch.no_grad():
                        known[node] = module(*fx.node.map_arg(node.args, known.__getitem__))


@without_gc()
def convert_graph(prepared: fx.GraphModule, strict: bool = False, pipeline: Pipeline | None = None) -> fx.GraphModule:
    """A quantized copy of a prepared graph, which stays usable; what stays in float is shared with it.

    ``pipeline`` is run instead of the standard one.

    Raises:
        ConvertError: the graph is not at the prepared stage.
        CalibrationError: an observer saw no data.
        StrictError: ``strict`` and an operation of the catalogue is left in float against the configuration's wish.
    """
    stage = graph_record(prepared).stage
    if stage != "prepared":
        hints = {
            "captured": "call qpass.prepare on the model first, calibrate, then convert",
            "quantized": "it is converted already: compile it with torch.compile(model, backend='qpass')",
            "lowered": "it is converted and lowered already",
        }
        raise ConvertError(f"convert takes a prepared model, and this graph is {stage}", hint=hints[stage])
    if pipeline is None:
        pipeline = convert_pipeline()
    refuse_misfit(pipeline, "quantized")
    if strict:
        refuse_left_in_float(prepared)
    gm = copy_graph_module(prepared, Draft)
    pipeline.run(gm)
    gm = rebuild(gm)
    freeze(gm)
    return gm


def freeze(gm: fx.GraphModule) -> None:
    """Parameters become views without gradient that share the model's memory."""
    for module in gm.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach(), requires_grad=False)


def refuse_nothing_quantized(gm: fx.GraphModule) -> None:
    """Raise when no operation is quantized, saying for each candidate why not."""
    reasons: dict[str, int] = {}
    for region in regions(gm):
        for node in region.graph.nodes:
            found = record_of(node)
            if found is not None and found.outcome == "quantized":
                return
            if found is not None and found.outcome == "float":
                line = f"{found.op}: {found.reason}"
                reasons[line] = reasons.get(line, 0) + 1
    listing = "\n         ".join(f"{line} (x{count})" for line, count in reasons.items()) or "no operation is there"
    raise ConfigError(
        "nothing in this model can be quantized with this configuration",
        where=listing,
        hint="choose another preset (int8_static, int8_dynamic, int8_weight_only) or remove overrides",
    )


def refuse_left_in_float(gm: fx.GraphModule) -> None:
    """Raise when an island of the catalogue was declined for any reason but the configuration's own."""
    left = [
        f"{found.module or node.name} ({found.op}): {found.reason}"
        for region in regions(gm) for node in region.graph.nodes
        if (found := record_of(node)) is not None and found.is_missed
    ]  # fmt: skip
    if left:
        raise StrictError(
            f"{len(left)} operations were left in float", where="\n         ".join(left),
            hint="name them in config.keep_float(...) to accept that, or convert without strict=True",
        )  # fmt: skip


def constant_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    every = [t for t in [*gm.parameters(), *gm.buffers()] if t.layout == torch.strided]
    tensors = {(t.untyped_storage()._cdata, t.storage_offset()): t for t in every}
    return sum(t.numel() * t.element_size() for t in tensors.values())
