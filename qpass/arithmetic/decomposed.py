"""torch.ops.quantized_decomposed, guaranteed to be there: the q/dq operators that graphs carry and runtimes read.

The operators are torch's or torchao's own wherever either has them; nothing of theirs is overridden. Only where
neither package exists are they defined here, with the kernels of `arithmetic.kernels`: defined first by anyone else,
torch could not define them any more, and every ``torch.compile`` of the process would fail.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from qpass import torch_private
from qpass.arithmetic import choose, kernels

NAMESPACE = "quantized_decomposed"

_Q = "int quant_min, int quant_max, ScalarType dtype"
_Q_TENSORS = "Tensor quant_min, Tensor quant_max, ScalarType dtype"
_OUT = "*, ScalarType? out_dtype=None"
_CHOOSE = "int quant_min, int quant_max, float eps, ScalarType dtype"

OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "quantize_per_tensor": (
        f"(Tensor input, float scale, int zero_point, {_Q}) -> Tensor",
        kernels.quantize_per_tensor,
    ),
    "quantize_per_tensor.tensor": (
        f"(Tensor input, Tensor scale, Tensor zero_point, {_Q}) -> Tensor",
        kernels.quantize_per_tensor,
    ),
    "quantize_per_tensor.tensor2": (
        f"(Tensor input, Tensor scale, Tensor zero_point, {_Q_TENSORS}) -> Tensor",
        kernels.quantize_per_tensor,
    ),
    "dequantize_per_tensor": (
        f"(Tensor input, float scale, int zero_point, {_Q}, {_OUT}) -> Tensor",
        kernels.dequantize_per_tensor,
    ),
    "dequantize_per_tensor.tensor": (
        f"(Tensor input, Tensor scale, Tensor zero_point, {_Q}, {_OUT}) -> Tensor",
        kernels.dequantize_per_tensor,
    ),
    "dequantize_per_tensor.tensor2": (
        f"(Tensor input, Tensor scale, Tensor zero_point, {_Q_TENSORS}, {_OUT}) -> Tensor",
        kernels.dequantize_per_tensor,
    ),
    "choose_qparams.tensor": (f"(Tensor input, {_CHOOSE}) -> (Tensor, Tensor)", choose.choose_qparams),
    "choose_qparams_symmetric.tensor": (
        f"(Tensor input, {_CHOOSE}) -> (Tensor, Tensor)",
        choose.choose_qparams_symmetric,
    ),
    "quantize_per_channel": (
        f"(Tensor input, Tensor scales, Tensor zero_points, int axis, {_Q}) -> Tensor",
        kernels.quantize_per_channel,
    ),
    "dequantize_per_channel": (
        f"(Tensor input, Tensor scales, Tensor? zero_points, int axis, {_Q}, {_OUT}) -> Tensor",
        kernels.dequantize_per_channel,
    ),
    "choose_qparams_per_token": (
        "(Tensor input, ScalarType dtype) -> (Tensor, Tensor)",
        choose.choose_qparams_per_token,
    ),
    "choose_qparams_per_token_asymmetric": (
        "(Tensor input, ScalarType dtype) -> (Tensor, Tensor)",
        choose.choose_qparams_per_token_asymmetric,
    ),
    "_choose_qparams_per_token_asymmetric_impl": (
        "(Tensor input, ScalarType dtype) -> (Tensor, Tensor)",
        choose.choose_qparams_per_token_asymmetric,
    ),
    "quantize_per_token": (
        f"(Tensor input, Tensor scales, Tensor zero_points, {_Q}) -> Tensor",
        kernels.quantize_per_token,
    ),
    "dequantize_per_token": (
        f"(Tensor input, Tensor scales, Tensor zero_points, {_Q}, ScalarType output_dtype) -> Tensor",
        kernels.dequantize_per_token,
    ),
    "quantize_per_channel_group": (
        f"(Tensor input, Tensor scales, Tensor zero_points, {_Q}, int group_size) -> Tensor",
        kernels.quantize_per_channel_group,
    ),
    "dequantize_per_channel_group": (
        f"(Tensor input, Tensor scales, Tensor? zero_points, {_Q}, int group_size, ScalarType output_dtype) -> Tensor",
        kernels.dequantize_per_channel_group,
    ),
    "fake_quant_per_channel": (
        "(Tensor input, Tensor scales, Tensor zero_points, int axis, int quant_min, int quant_max) -> Tensor",
        kernels.fake_quant_per_channel,
    ),
    "convert_element_type.no_fuse": ("(Tensor input, ScalarType dtype) -> Tensor", kernels.convert_element_type),
}
"""Overload name (no dot: ``.default``) -> its schema, its kernel in plain ATen."""

IMPLICIT = ("_choose_qparams_per_token_asymmetric_impl", "fake_quant_per_channel")
"""What torch's autograd is to see through; the others stay whole in exported graphs."""

_lock = threading.Lock()
_library: torch.library.Library | None = None  # kept alive: its definitions go with it


def register() -> None:
    """Make sure that every operator of `OPERATORS` exists. Safe from any thread, any number of times."""
    with _lock:
        for package in ("torch.ao.quantization.fx._decomposed", "torchao.quantization.pt2e"):
            if not _missing():
                return
            try:
                importlib.import_module(package)
            except ModuleNotFoundError:
                continue
        _define(_missing())


def overload(name: str, namespace: Any = torch.ops.quantized_decomposed) -> torch_private.OpOverload:
    """The operator of that name: ``"quantize_per_tensor.tensor"``, or without the dot for ``.default``."""
    packet, _, suffix = name.partition(".")
    found: torch_private.OpOverload = getattr(getattr(namespace, packet), suffix or "default")
    return found


def _missing() -> list[str]:
    return [name for name in OPERATORS if not _is_defined(name)]


def _is_defined(name: str) -> bool:
    packet, _, suffix = name.partition(".")
    return torch_private.dispatch_has_kernel(f"{NAMESPACE}::{packet}" + (f".{suffix}" if suffix else ""))


def _define(names: list[str]) -> None:
    global _library
    if not names:
        return
    _library = _library or torch.library.Library(NAMESPACE, "FRAGMENT")
    for name in names:
        schema, kernel = OPERATORS[name]
        _library.define(name + schema)
        _library.impl(name, kernel, "CompositeImplicitAutograd" if name in IMPLICIT else "CompositeExplicitAutograd")


graph_ops = torch.ops.quantized_decomposed
register()
