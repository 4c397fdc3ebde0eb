"""Errors of capture: each names the user's line and says what to do."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from qpass import torch_private
from qpass.errors import CaptureError, InputError
from qpass.ir.alias import all_arguments
from qpass.ir.normalize import draws_random_numbers
from qpass.ir.record import GRAPH_KEY, GraphRecord
from qpass.ir.regions import regions
from qpass.ir.source import is_user_file, where
from qpass.ir.text import target_name
from qpass.ir.training_modules import BY_MODE

_QPASS = os.path.dirname(os.path.dirname(__file__)) + os.sep

# What the message of an export error says -> what to do about it; the first that matches.
_HINTS = (
    (
        r"data-dependent|GuardOnDataDependent|dynamic control flow|UnbackedSymNode",
        "the model decides on the value of a tensor; use torch.cond for a branch, torch.where for a choice of values,"
        " torch._check to bound a size",
    ),
    (
        r"Cache'?> in output",
        "call a transformers model without its cache: use_cache=False among the kwargs, or in its config",
    ),
    (
        r"(Dynamic|Static|\w*)Cache'?>",
        "leave the cache out of the example inputs (use_cache=False among the kwargs); a model that generates with one "
        'is compiled in place: model.forward = torch.compile(model.forward, backend="qpass")',
    ),
    (
        r"inference tensor",
        "the model was built under torch.inference_mode, and its parameters take no part in a trace: "
        "copy.deepcopy(model) outside of it makes ordinary ones",
    ),
    (r"same device|device mismatch", "put the model and all example inputs on one device: x.to(device)"),
    (r"numpy\.", "pass tensors: torch.from_numpy(array)"),
    (
        r"register_dataclass|register a pytree|not a known type",
        "register the class once, before this call: torch.export.register_dataclass(TheClass)",
    ),
    (
        r"positional argument|required argument|unexpected keyword|missing a required|multiple values",
        "pass example_inputs (and kwargs) just as the model's forward takes them",
    ),
    (
        r"[Cc]onstraint|dynamic_shapes|dynamic shapes",
        "give dynamic_shapes that the model allows, or none: the batch dimension is made dynamic where it can be",
    ),
)
_DEFAULT_HINT = (
    "change this line to what torch.export can trace, or export the model yourself and pass the ExportedProgram"
)


def explain(error: Exception, model: nn.Module) -> CaptureError:
    """The CaptureError for an exception of ``torch.export.export(model)``."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    cause = " ".join(lines[:1])[:300] or type(error).__name__
    hint = next((words for pattern, words in _HINTS if re.search(pattern, f"{type(error).__name__} {text}")), None)
    return CaptureError(
        f"torch.export cannot capture {type(model).__name__}: {cause}",
        where=_user_line(error) or type(model).__name__,
        hint=hint or _DEFAULT_HINT,
    )


def refuse_kind(model: Any) -> None:
    """Raise InputError where ``prepare`` was given something other than a model that it takes."""
    kind = type(model).__name__
    if isinstance(model, type):
        raise InputError(f"the model is the class {model.__name__}", hint=f"pass an instance: {model.__name__}(...)")
    if isinstance(model, torch_private.OptimizedModule):
        raise InputError(
            "the model is compiled already, and what it is compiled to cannot be quantized",
            hint="prepare the model that torch.compile was given, and compile the converted one",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            f"the model is TorchScript ({kind}), which torch.export does not read",
            hint="pass the Python model that it was scripted or traced from",
        )
    if not isinstance(model, (nn.Module, ExportedProgram)):
        what = f"prepare takes an nn.Module, an ExportedProgram or a GraphModule, not {kind}"
        raise InputError(what, hint="pass the model itself")


def refuse_autocast() -> None:
    """Raise CaptureError under ``torch.autocast``: the graph would keep its casts for ever."""
    if torch.is_autocast_enabled("cpu"):
        raise CaptureError(
            f"torch.autocast is on, so the model would be captured with its casts to {torch.get_autocast_dtype('cpu')}",
            hint="prepare the model outside of torch.autocast; compute_dtype of the config says what is not quantized "
            "computes in",
        )


def refuse_model(model: nn.Module | ExportedProgram) -> None:
    """Raise InputError for anything but a float model, and CaptureError where a parameter or buffer holds no data."""
    tensors: list[tuple[str, Any]]
    if isinstance(model, ExportedProgram):
        tensors = [*model.state_dict.items(), *model.constants.items()]
    elif isinstance(model, nn.Module):
        tensors = [*model.named_parameters(), *model.named_buffers()]
    else:
        raise InputError(
            f"a model is an nn.Module, an ExportedProgram or a GraphModule, not {type(model).__name__}",
            hint="pass the model itself",
        )
    record = model.meta.get(GRAPH_KEY) if isinstance(model, fx.GraphModule) else None
    if isinstance(record, GraphRecord) and record.stage != "captured":
        raise InputError(f"the model is {record.stage} already", hint="start again from the float model")
    empty = [name for name, tensor in tensors if getattr(tensor, "is_meta", False)]
    if empty:
        raise CaptureError(
            f"the model is on the meta device: {len(empty)} of its tensors hold no data",
            where=empty[0],
            hint="load the weights first, for example model.to_empty(device='cpu') and load_state_dict",
        )


def refuse_graph(gm: fx.GraphModule) -> None:
    """Raise CaptureError when the captured graph is in training mode or has nothing to quantize in principle."""
    for region in regions(gm):
        for node in region.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch_private.OpOverload) and _trains(node):
                raise CaptureError(
                    f"the model is in training mode: {target_name(node)} behaves as in training",
                    where=where(node),
                    hint="call model.eval() first; a functional call needs training=self.training",
                )
    if not any(map(_is_floating, _values(gm))):
        raise CaptureError(
            f"{type(gm).__name__} computes with integers alone, so there is nothing to quantize",
            where=type(gm).__name__,
            hint="pass the float model; a quantized one is not quantized again",
        )


def _trains(node: fx.Node) -> bool:
    if BY_MODE in node.meta:
        return False
    values = {entry.name: value for entry, value in all_arguments(node)}
    if values.get("running_mean") is not None:  # a norm that would update its statistics
        return any(values.get(flag) is True for flag in ("training", "train", "use_input_stats"))
    return draws_random_numbers(node) and any(name in values for name in ("train", "training", "dropout", "dropout_p"))


def _values(gm: fx.GraphModule) -> Iterator[object]:
    for region in regions(gm):
        for node in region.graph.nodes:
            val = node.meta.get("val")
            yield from val if isinstance(val, (tuple, list)) else (val,)


def _is_floating(val: object) -> bool:
    return isinstance(val, torch.Tensor) and (val.is_floating_point() or val.is_complex())


def _user_line(error: BaseException) -> str:
    """``"file.py:12: code"`` of the innermost frame of the user's, or of a library's, below the exception's causes."""
    found = ""
    current: BaseException | None = error
    while current is not None and not found:
        frames = list(traceback.extract_tb(current.__traceback__)) + list(getattr(current, "real_stack", None) or ())
        for frame in frames:
            if is_user_file(frame.filename) and not frame.filename.startswith(_QPASS):
                code = frame.line or linecache.getline(frame.filename, frame.lineno or 0)
                found = f"{os.path.basename(frame.filename)}:{frame.lineno}: {code.strip()}"
        current = current.__cause__ or current.__context__
    return found
