"""Warnings for a graph that is exported, by torch.export or by torch.onnx.export, which calls it."""

from __future__ import annotations

import sys
import warnings
from contextvars import ContextVar

import torch
from torch import fx

from qpass.errors import InputError
from qpass.ir.record import graph_record

WARNED_KEY = "qpass_warned_of_export"
QUIET: ContextVar[bool] = ContextVar("qpass_export_is_our_own", default=False)
"""True while qpass itself exports a graph, for a file that it reads again."""


class ExportWarning(UserWarning):
    """What differs between an exported graph and the graph that qpass compiles."""


def asked_for_tensors(gm: fx.GraphModule) -> None:
    """Warn where torch.export asks ``gm`` itself for its tensors: it does so first, and then interprets the graph
    without a call. Its flag is not up yet, so the module of the caller tells.

    Raises:
        InputError: the graph is lowered.
    """
    caller = str(sys._getframe(2).f_globals.get("__name__"))
    if not caller.startswith(("torch.export.", "torch._export.")):
        return
    if graph_record(gm).stage == "lowered":
        raise InputError(
            "a lowered graph cannot be exported: its weights are packed for this machine",
            hint="export the quantized graph that it was made from; for int8 kernels, run that one by "
            'torch.compile(model, backend="qpass")',
        )
    warn_of_export(gm)


def warn_of_export(gm: fx.GraphModule) -> None:
    """Warn about what the exported graph lacks: once for each graph and format, or each export of a model around it."""
    record = graph_record(gm)
    kind = "onnx" if torch.onnx.is_in_onnx_export() else "export"
    warned: set[str] = gm.meta.setdefault(WARNED_KEY, set())
    if record.stage != "quantized" or kind in warned or QUIET.get():
        return
    warned.add(kind)
    sentences = list(_of_onnx(gm) if kind == "onnx" else _OF_EXPORT)
    if sentences:
        warnings.warn("\n  ".join(sentences), ExportWarning, stacklevel=2)


_OF_EXPORT = (
    "an exported quantized graph is quantize and dequantize operators around float ones: AOTInductor, and "
    "torch.compile without qpass, compute it in floating point and dequantize its weights.",
    'to do: for int8 kernels, run torch.compile(model, backend="qpass") in Python; to keep the model, use qpass.save',
)


def _of_onnx(gm: fx.GraphModule) -> list[str]:
    nodes = [node for region in gm.modules() if isinstance(region, fx.GraphModule) for node in region.graph.nodes]
    sentences = []
    low = {torch.bfloat16, torch.float16} & {getattr(node.meta.get("val"), "dtype", None) for node in nodes}
    if low:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low))
        sentences += [
            f"this graph computes in {names} what is not quantized, and the ONNX file will: onnxruntime refuses "
            "bfloat16 in many operators.",
            "to do: prepare with a config of compute_dtype=None, as qpass.presets.int8_static(compute_dtype=None)",
        ]
    if any("choose_qparams" in str(node.target) for node in nodes):
        sentences += [
            "this graph computes scales while it runs (choose_qparams), for which torch.onnx has no form: it fails.",
            "to do: for ONNX, prepare with int8_static or int8_weight_only",
        ]
    return sentences
