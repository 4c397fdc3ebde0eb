"""What nodes would compute, without computing it: ``meta["val"]``, fake values whose sizes stay symbolic."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.torch_private import FakeTensor, FakeTensorMode, enable_python_dispatcher, tree_flatten, tree_unflatten


def fake_call(*args: Any, call: Callable[..., Any], **kwargs: Any) -> Any:
    """The fake result of ``call`` on the fake values of its arguments, or None where a node has none."""
    return fake_result(call, args, kwargs, {})


def fake_result(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], instead: Mapping[fx.Node, Any]
) -> Any:
    """As :func:`fake_call`, with the values in ``instead`` for those of its nodes.

    Calls that differ in nothing but in which nodes they read share one result, as those of equal layers do.
    """
    leaves, form = tree_flatten((args, dict(kwargs)))
    nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    mode = fake_mode_of(nodes[0].graph) if nodes else None
    if mode is None or any("val" not in node.meta for node in nodes):
        return None
    leaves = [instead.get(leaf, leaf.meta["val"]) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    known: dict[Any, Any] = nodes[0].graph.__dict__.setdefault("_qpass_fake_results", {})
    key = (call, form, tuple(map(_described, leaves))) if _is_function_of_forms(call) else None
    try:
        if key in known:
            return known[key]
    except TypeError:  # an argument that has no hash
        key = None
    args, kwargs = tree_unflatten(leaves, form)
    # some operators take symbolic sizes in their Python form only
    by_python = enable_python_dispatcher() if mode.shape_env is not None else contextlib.nullcontext()
    with mode, by_python, torch.no_grad():
        result = call(*args, **kwargs)
    if key is not None and isinstance(result, torch.Tensor):
        known[key] = result
    return result


def _is_function_of_forms(call: Callable[..., Any]) -> bool:
    """Whether sizes and dtypes of a result follow from those of the arguments, and it is no argument itself."""
    if not isinstance(call, torch_private.OpOverload):
        return False
    of_values = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    return not call._schema.is_mutable and not any(tag in call.tags for tag in of_values)


def _described(val: Any) -> Any:
    """All of an argument that the form of a result may depend on."""
    if isinstance(val, torch.Tensor) and val.layout == torch.strided:
        return (val.dtype, val.device, len(val.shape), terms((*val.shape, *val.stride())))
    if isinstance(val, torch.Tensor):
        return val  # itself: kept alive, it is told from any other
    return (type(val), val.node.expr if isinstance(val, torch.SymInt) else val)


def terms(sizes: Iterable[int | torch.SymInt]) -> tuple[Any, ...]:
    """Sizes as numbers and expressions, which compare without a guard."""
    return tuple(size if isinstance(size, int) else size.node.expr for size in sizes)


def recompute_val(node: fx.Node) -> None:
    """Compute ``meta["val"]`` of an operator node again, after one of its inputs changed."""
    val = fake_call(*node.args, call=node.target, **node.kwargs)  # type: ignore[arg-type]  # it is an operator
    if val is not None:
        node.meta["val"] = val


def fake_mode_of(graph: fx.Graph) -> FakeTensorMode | None:
    """The fake mode that the graph's values live in."""
    cached = getattr(graph, "_qpass_fake_mode", None)
    if cached is not None:
        return cached
    for node in graph.nodes:
        val = node.meta.get("val")
        for leaf in val if isinstance(val, (tuple, list)) else (val,):
            if isinstance(leaf, FakeTensor):
                graph.__dict__["_qpass_fake_mode"] = leaf.fake_mode
                return leaf.fake_mode
    return None


def fake_constant(value: torch.Tensor, mode: FakeTensorMode | None) -> Any:
    """A fake twin of a constant; opaque tensors (prepacked weights) have the size of their plain form."""
    if mode is None:
        return None
    if value.layout != torch.strided:
        with mode:
            return torch.empty(tuple(value.shape), dtype=value.dtype)
    return mode.from_tensor(value, static_shapes=True)
