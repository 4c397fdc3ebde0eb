"""Signal to quantization noise: how far one model's outputs are from another's, in dB."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from qpass.errors import InputError, QpassError
from qpass.inspect.sqnr_nodes import SqnrByNode, sqnr_by_node
from qpass.inspect.unchanged import copied, unchanged
from qpass.torch_private import tree_leaves


@overload
def sqnr(a: Callable[..., Any], b: Callable[..., Any], inputs: Any, *, nodes: Literal[False] = False) -> float: ...
@overload
def sqnr(a: Any, b: Any, inputs: Any, *, nodes: Literal[True]) -> SqnrByNode: ...


def sqnr(a: Any, b: Any, inputs: Any, *, nodes: bool = False) -> float | SqnrByNode:
    """``10 * log10(sum(ref ** 2) / sum((ref - x) ** 2))`` in dB, ``ref`` the outputs of ``a`` and ``x`` those of ``b``.

    The sums run in float64 over all tensors of the outputs, whatever pytree holds them, and over all batches. 6 dB are
    one bit; int8 models lie at 20 to 45 dB; ``inf`` means equal, ``-inf`` noise on a reference of zeros. Never ``nan``.
    Batches follow one another as in use: caches and counters move with them, and are as before at the end. ``inputs``
    stay as they are, also where a model writes to them.

    Args:
        a: the reference, a module or any callable.
        b: what is compared with it; must return as many tensors, of the same shapes.
        inputs: one batch as a tensor, a tuple of arguments or a mapping by keyword, or a list of such batches.
        nodes: measure every matched node instead of the outputs alone: ``a`` and ``b`` are then graphs, exported
            programs or modules, and the result maps the nodes of ``b`` to dB (see :class:`SqnrByNode`).

    Raises:
        InputError: there is no batch or no output tensor, or the outputs of the two do not correspond.
        QpassError: an output holds nan or infinity, or its squares overflow float64.
    """
    if nodes:
        if not batches(inputs):
            raise InputError("there is nothing to compare: no batch", hint="pass some inputs")
        return sqnr_by_node(a, b, batches(inputs))
    signal = noise = 0.0
    count = 0
    with unchanged(a, b):
        for batch in batches(inputs):
            with torch.no_grad():
                reference, other = (tree_leaves(_call(f, copied(batch))) for f in (a, b))
            for index, (ref, x) in enumerate(_corresponding(reference, other)):
                signal += _energy(ref, f"output {index} of the reference")
                compared = _finite(x, f"output {index} of the compared model")
                noise += _energy(ref - compared, f"the noise of output {index}")
                count += 1
    if not count:
        raise InputError("there is nothing to compare: no batch, or no tensor in the outputs", hint="pass some inputs")
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal else -math.inf


def batches(inputs: Any) -> list[Any]:
    """``inputs`` as a list of batches: a list is one already, anything else is a single batch."""
    return inputs if isinstance(inputs, list) else [inputs]


def _call(f: Callable[..., Any], batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return f(**batch)
    return f(*batch) if isinstance(batch, (tuple, list)) else f(batch)


def _corresponding(reference: list[Any], other: list[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """The output tensors of both in float64, pair by pair."""
    pair = [[leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)] for leaves in (reference, other)]
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in pair]
    if shapes[0] != shapes[1]:
        raise InputError(
            f"the outputs do not correspond: shapes {shapes[0]} of the reference and {shapes[1]} of the compared model",
            hint="compare two forms of one model, on the same inputs",
        )
    for ref, x in zip(*pair, strict=True):
        yield _double(ref), _double(x)


def _double(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.to(device="cpu", dtype=torch.float64)


def _energy(tensor: Tensor, what: str) -> float:
    return float(_finite(_finite(tensor, what).square().sum(), f"the sum of squares of {what}"))


def _finite(tensor: Tensor, what: str) -> Tensor:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        raise QpassError(
            f"{what} holds {bad} of {tensor.numel()} values that are nan or infinite, and noise has no ratio to those",
            hint="find the operation that makes them, or compare models that return finite values only",
        )
    return tensor
