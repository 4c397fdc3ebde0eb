"""From a captured graph to a prepared one, and from there to a quantized one."""

from __future__ import annotations

import torch
from torch import fx

from qpass import targets
from qpass.errors import ConfigError, ConvertError, StrictError
from qpass.ir.edit import copy_graph_module, get_constant, rebuild
from qpass.ir.gradient import DETACH
from qpass.ir.modes import FoldedWeight, FoldFactor
from qpass.ir.module import Draft
from qpass.ir.ownership import own_tensors
from qpass.ir.pipeline import Pipeline, without_gc
from qpass.ir.record import graph_record, record_of
from qpass.ir.regions import regions
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.assign_compute_dtype import AssignComputeDtype
from qpass.quantize.passes.cast_compute_dtype import CastComputeDtype
from qpass.quantize.passes.expand_attention import ExpandAttention
from qpass.quantize.passes.fold_batch_norm import FoldBatchNorm
from qpass.quantize.passes.fold_constants import FoldConstants
from qpass.quantize.passes.hoist_casts import HoistCasts
from qpass.quantize.passes.insert_modes import InsertModes
from qpass.quantize.passes.insert_observers import InsertObservers
from qpass.quantize.passes.keep_strides import KeepStrides
from qpass.quantize.passes.lower_observers import LowerObservers
from qpass.quantize.passes.remove_modes import RemoveModes
from qpass.quantize.passes.set_dropout_aside import SetDropoutAside
from qpass.spec.config import Config, resolve_compute_dtype, unmatched
from qpass.spec.fake_quantize import FakeQuantizeBase
from qpass.targets import Target


@without_gc()
def prepare_graph(
    captured: fx.GraphModule, config: Config, target: str | Target, partial: bool = False
) -> fx.GraphModule:
    """A prepared copy of a captured graph; weights are shared, unless they are to be trained. ``partial``: the graph
    may be a part of a model, whose other parts the overrides may mean.

    Raises:
        ConfigError: an override matches nothing, the target is unknown, or nothing can be quantized.
    """
    chosen = targets.for_graph(captured, target)
    gm = copy_graph_module(captured, Draft)
    record = graph_record(gm)
    record.config = config
    record.float_bytes = constant_bytes(gm)
    annotate = Annotate(config, chosen)
    dtype = resolve_compute_dtype(config, chosen.fast_dtype())
    expands = chosen.expands_attention()
    casts = () if dtype is None else (AssignComputeDtype(dtype, expands),)
    passes = (SetDropoutAside(), annotate, InsertObservers(), *casts, InsertModes())
    Pipeline("prepared", passes).run(gm)
    seen = annotate.seen
    record.weight_bytes, record.weight_bytes_kept = seen.weights.total, seen.weights.kept
    fault = unmatched(config, seen.overrides, seen.paths, seen.ops, seen.paths.values())
    if fault is not None and not partial:
        raise fault
    refuse_nothing_quantized(gm)
    gm = rebuild(gm)
    if config.trains:
        own_tensors(gm)
        fit_weights(gm)
    return gm


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
def convert_graph(prepared: fx.GraphModule, strict: bool = False) -> fx.GraphModule:
    """A quantized copy of a prepared graph, which stays usable; what stays in float is shared with it.

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
    if strict:
        refuse_left_in_float(prepared)
    gm = copy_graph_module(prepared, Draft)
    passes = (
        RemoveModes(), FoldBatchNorm(), LowerObservers(),
        CastComputeDtype(), ExpandAttention(), HoistCasts(), KeepStrides(), FoldConstants(),
    )  # fmt: skip
    Pipeline("quantized", passes).run(gm)
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
