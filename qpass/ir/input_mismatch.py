"""What is wrong with the inputs of a call that failed: which input, what came, what the graph holds for."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx

from qpass.arithmetic.numerics import dtype_name
from qpass.errors import InputError
from qpass.ir.guard import HOLDS, static_size, symbol_of
from qpass.torch_private import keystr, tree_flatten_with_path


def input_mismatch(
    gm: fx.GraphModule, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
) -> InputError | None:
    """The error that says why ``gm`` cannot be called like this; None where its inputs are not to blame for ``error``.

    The values of the placeholders say what the graph holds for: dtypes, static sizes and Python values. What else the
    graph asserts of its inputs is told by ``error``.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    if not all("val" in node.meta for node in inputs):
        return None
    try:
        bound = inspect.signature(gm.forward).bind(*args, **kwargs)
    except TypeError as unbound:
        return InputError(f"the call does not fit the model's arguments: {unbound}", hint=_as_captured(gm))
    given = [(name, path, leaf) for name, value in bound.arguments.items() for path, leaf in _leaves(value)]
    if len(given) != len(inputs):
        return InputError(
            f"the inputs of this call hold {len(given)} values, and the model was captured with {len(inputs)}",
            hint="pass lists, dicts and optional inputs just as in the example inputs, or prepare the model again",
        )
    for (name, path, leaf), node in zip(given, inputs, strict=True):
        fault = _fault(leaf, node.meta["val"]) if node.users or not isinstance(leaf, Tensor) else ""
        if fault:
            sizes = "has the sizes" in fault
            hint = _shapes_hint(inputs, given, node) if sizes else "pass it like that, or prepare the model again"
            return InputError(f"input {name + path!r} {fault}", hint=hint)
    text = str(error)
    return InputError(text, hint=_ALLOW) if text.startswith("dimension ") and HOLDS in text else None


_ALLOW = "prepare the model with example inputs of such sizes, or with dynamic_shapes that allow them"


def _leaves(value: Any) -> list[tuple[str, Any]]:
    return [(keystr(path), leaf) for path, leaf in tree_flatten_with_path(value)[0]]


def _fault(leaf: Any, val: Any) -> str:
    """What is wrong with one input, as the end of a sentence; "" where it is as it was."""
    if isinstance(val, Tensor):
        if not isinstance(leaf, Tensor):
            return f"is {_kind(leaf)}, and was a tensor when the model was captured"
        if not _fits(leaf, val):
            sizes = ", ".join("any" if (size := static_size(s)) is None else str(size) for s in val.shape)
            return f"has the sizes {list(leaf.shape)}, and the model was captured for [{sizes}]"
        if leaf.dtype != val.dtype:
            return f"is {dtype_name(leaf.dtype)}, and was {dtype_name(val.dtype)} when the model was captured"
        if leaf.device != val.device:
            return f"is on {leaf.device}, and was on {val.device} when the model was captured"
        return ""
    if isinstance(val, torch.SymInt | torch.SymFloat | torch.SymBool):
        return ""
    same = type(leaf) is type(val) and bool(leaf == val)
    return "" if same else f"is {_kind(leaf)}, and was {val!r} when the model was captured"


def _fits(leaf: Tensor, val: Tensor) -> bool:
    wanted = [static_size(size) for size in val.shape]
    return leaf.dim() == len(wanted) and all(w in (None, size) for w, size in zip(wanted, leaf.shape, strict=True))


def _kind(leaf: Any) -> str:
    if isinstance(leaf, Tensor):
        return "a tensor"
    return repr(leaf) if isinstance(leaf, (int, float, bool, str, type(None))) else f"a {type(leaf).__name__}"


def _shapes_hint(inputs: list[fx.Node], given: list[tuple[str, str, Any]], mismatching: fx.Node) -> str:
    """The ``dynamic_shapes`` that would allow this call, where every argument is one value; else how to find them."""
    shapes = []
    for (name, path, leaf), node in zip(given, inputs, strict=True):
        val = node.meta["val"]
        alike = isinstance(leaf, Tensor) and isinstance(val, Tensor) and leaf.dim() == val.dim()
        if path or (node is mismatching and not alike):
            return _ALLOW
        sizes = zip(val.shape, leaf.shape, strict=True) if alike else ()
        dims = [dim for dim, (was, is_) in enumerate(sizes) if symbol_of(was) is not None or was != is_]
        inner = ", ".join(f"{dim}: Dim.AUTO" for dim in dims)
        shapes.append(f"{name!r}: {{{inner}}}" if dims else f"{name!r}: None")
    return f"to allow it, prepare the model with dynamic_shapes={{{', '.join(shapes)}}} (from torch.export import Dim)"


def _as_captured(gm: fx.GraphModule) -> str:
    names = list(inspect.signature(gm.forward).parameters)
    return f"the model was captured with the inputs {', '.join(names) or '(none)'}"
