"""``quantize(x, 0.02, 128, ...)`` <-> ``state_dict()["encoder/output_scale"]``: numbers of a graph, saved and loaded.

Static scales and zero points are numbers in the graph, which exporters and kernels read. They belong to the state of
the model all the same: :func:`keep_qparams` has ``state_dict`` write them, and ``load_state_dict`` put them into the
graph. With them goes, for every tensor that is quantized, how it is quantized: a state of another configuration is
refused by the name of the key. The keys, each a prefix and one of these words::

    layers/0/output_scale       float64 []   of what ``layers.0`` computes; ``x_scale`` is that of the input ``x``
    layers/0/output_zero_point  int64 []
    layers/0/output_spec        uint8 [n]    "uint8 0..255 per tensor", in ASCII
    layers/0/weight_spec        uint8 [n]    "int8 -127..127 per channel 0"; its codes and scales are buffers

``output_1_scale`` is the second of its kind. A slash and not a dot, since `torch.distributed.checkpoint` looks for an
attribute behind every dot. Names depend on the model and on what of it is quantized, not on what is
computed in which floating dtype, so states go from one machine to another.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.errors import StateError
from qpass.ir.match import set_arguments
from qpass.ir.regions import regions
from qpass.ir.source import module_path
from qpass.islands.qdq import CHOOSE, SYMMETRIC_CHOICES, QParams, as_dequantize, as_quantize, cast_of
from qpass.spec.fake_quantize.spec_state import as_tensor, described, not_of, text_of
from qpass.spec.quantization_spec import written


@dataclass
class Quantized:
    """One tensor that is quantized: the prefix of its keys, how it is quantized, and the nodes that say so."""

    name: str
    spec: str
    qparams: QParams
    nodes: list[fx.Node] = field(default_factory=list)


def keep_qparams(gm: fx.GraphModule) -> None:
    """Make scales, zero points and specs of ``gm``, a quantized graph, part of its state dict."""
    gm.register_state_dict_post_hook(_save)
    gm.register_load_state_dict_pre_hook(_load)


def refuse_state(gm: fx.GraphModule) -> None:
    """Let ``gm``, a lowered graph, load no state: packed weights are of one machine, and kernels hold the scales."""
    gm.register_load_state_dict_pre_hook(_refuse)


def quantized_tensors(gm: fx.GraphModule) -> list[Quantized]:
    """The quantized tensors of a graph and its regions, weights among them, in graph order."""
    taken: set[str] = {name for name, _ in [*gm.named_parameters(), *gm.named_buffers()]}
    paths = {id(module): path for path, module in gm.named_modules()}
    found: dict[fx.Node, Quantized] = {}

    def add(node: fx.Node, name: str, qparams: QParams) -> None:
        words = ("spec", "scale", "zero_point") if qparams.is_static else ("spec",)
        path = f"{paths[id(region)]}.{name}"  # a region's keys start with its own path
        name = _free("/".join(filter(None, path.split("."))), words, taken)
        found[node] = Quantized(name, _written(qparams), qparams, [node])

    for region in regions(gm):
        for node in region.graph.nodes:
            if (pair := as_quantize(node)) is not None:
                add(node, _name(node), pair.qparams)
            elif (pair := as_dequantize(node)) is not None:
                known = found.get(pair.value)
                if known is not None and _numbers(known.qparams) == _numbers(pair.qparams):
                    known.nodes.append(node)
                elif known is None or pair.qparams.is_static:
                    add(node, _name_of_codes(pair.value, node), pair.qparams)
    return list(found.values())


def _save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, fx.GraphModule)
    for tensor in quantized_tensors(module):
        key = prefix + tensor.name
        state[f"{key}_spec"] = as_tensor(tensor.spec)
        if tensor.qparams.is_static:
            state[f"{key}_scale"] = torch.tensor(tensor.qparams.scale, dtype=torch.float64)
            state[f"{key}_zero_point"] = torch.tensor(tensor.qparams.zero_point)


def _refuse(*_: Any) -> None:
    raise StateError(
        "a lowered graph loads no state dict: its weights are packed and its scales are written into kernels",
        hint="load it into the quantized graph, and call qpass.lower again or compile that one",
    )


def _load(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
) -> None:
    """Take the keys of the graph's numbers off ``state``, check them all, and write them into the graph."""
    assert isinstance(module, fx.GraphModule)
    tensors = quantized_tensors(module)
    faults = [fault for tensor in tensors for fault in _faults(tensor, prefix + tensor.name, state)]
    if faults:
        raise not_of(module, faults)
    changed = False
    for tensor in tensors:
        key = prefix + tensor.name
        if state.pop(f"{key}_spec", None) is None:
            missing.append(f"{key}_spec")
        if not tensor.qparams.is_static:
            continue
        scale, zero_point = state.pop(f"{key}_scale", None), state.pop(f"{key}_zero_point", None)
        missing += [f"{key}_{word}" for word, value in (("scale", scale), ("zero_point", zero_point)) if value is None]
        numbers = {
            "scale": tensor.qparams.scale if scale is None else float(scale),
            "zero_point": tensor.qparams.zero_point if zero_point is None else int(zero_point),
        }
        if numbers != {"scale": tensor.qparams.scale, "zero_point": tensor.qparams.zero_point}:
            changed = True
            for node in tensor.nodes:
                set_arguments(node, **numbers)
    if changed:
        _regenerate(module)


def _regenerate(gm: fx.GraphModule) -> None:
    """New code for the graph as it is, in a new class: Dynamo guards on a module's class and not on its code, so a
    compiled function that calls ``gm`` traces it again, too."""
    for region in regions(gm):
        kind = type(region)
        names = {"__qualname__": kind.__qualname__, "__module__": kind.__module__}
        region.__class__ = type(kind.__name__, kind.__bases__, names)
        region.recompile()


def _faults(tensor: Quantized, key: str, state: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the saved values of one tensor, each with its key."""
    spec = state.get(f"{key}_spec")
    if spec is not None and (theirs := text_of(spec)) != tensor.spec:
        yield f"{key}_spec: the state is of {theirs}, and this model quantizes to {tensor.spec}"
        return
    if not tensor.qparams.is_static:
        return
    scale, zero_point = state.get(f"{key}_scale"), state.get(f"{key}_zero_point")
    for word, value in (("scale", scale), ("zero_point", zero_point)):
        if value is not None and not (isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta):
            yield f"{key}_{word}: one number is expected, not {described(value)}"
            return
    if scale is not None and not (math.isfinite(float(scale)) and float(scale) > 0):
        yield f"{key}_scale: {float(scale)} is not positive and finite"
    low, high = tensor.qparams.quant_min, tensor.qparams.quant_max
    if zero_point is not None and not (low <= float(zero_point) <= high and float(zero_point).is_integer()):
        yield f"{key}_zero_point: {zero_point.item()} is not a code within {low}..{high}"


def _name(quantize: fx.Node) -> str:
    """``encoder.output``, or the name of the model's input that is quantized."""
    source: Any = quantize.all_input_nodes[0]
    while (inner := cast_of(source)) is not None:
        source = inner
    if source.op == "placeholder":
        return str(source.target)
    return f"{module_path(quantize)}.output"


def _name_of_codes(codes: fx.Node, dequantize: fx.Node) -> str:
    if codes.op == "get_attr":
        return re.sub(r"_codes(?=(_\d+)?$)", "", str(codes.target))
    return f"{module_path(dequantize)}.codes"


def _free(name: str, words: tuple[str, ...], taken: set[str]) -> str:
    """``name``, or the first of ``name_1``, ``name_2``, ... of which no key with these words is taken; it is now."""
    candidate, number = name, 0
    while not taken.isdisjoint(keys := [f"{candidate}_{word}" for word in words]):
        number += 1
        candidate = f"{name}_{number}"
    taken.update(keys)
    return candidate


def _numbers(qparams: QParams) -> tuple[Any, Any]:
    return qparams.scale, qparams.zero_point


def _written(qparams: QParams) -> str:
    choice = qparams.scale.args[0] if isinstance(qparams.scale, fx.Node) and qparams.scale.args else None
    dynamic = isinstance(choice, fx.Node) and choice.target in CHOOSE
    symmetric = isinstance(choice, fx.Node) and choice.target in SYMMETRIC_CHOICES
    bounds = (qparams.quant_min, qparams.quant_max)
    return written(qparams.dtype, bounds, qparams.granularity, dynamic, symmetric)
