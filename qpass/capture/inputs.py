"""Example inputs in the form that a trace takes: positional and keyword, as new tensor objects, at any batch size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import InputError
from qpass.torch_private import keystr, tree_flatten, tree_flatten_with_path, tree_map_only


def example_of(example_inputs: Any, kwargs: Any, model: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword inputs, from the forms in which users give them.

    Raises:
        InputError: there are none, or `example_inputs` is neither a tuple, a tensor nor a dict.
    """
    if example_inputs is None and kwargs is None:
        raise InputError(
            f"{type(model).__name__} can be captured only with example inputs",
            hint="pass example_inputs=(x,), the positional inputs of one call",
        )
    keywords = dict(kwargs or {})
    for path, leaf in tree_flatten_with_path((example_inputs, keywords))[0]:
        if type(leaf).__module__ == "numpy":
            raise InputError(
                f"an example input is a numpy.{type(leaf).__name__}: {keystr(path[1:]) or 'example_inputs'}",
                hint="pass tensors: torch.from_numpy(array)",
            )
    if isinstance(example_inputs, Mapping):
        return (), {**example_inputs, **keywords}
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), keywords
    if isinstance(example_inputs, (tuple, list)) or example_inputs is None:
        return tuple(example_inputs or ()), keywords
    raise InputError(
        f"example_inputs is a tuple of positional inputs, one tensor or a dict, not {type(example_inputs).__name__}",
        hint="pass example_inputs=(x,); x is one batch, as next(iter(loader)) gives it",
    )


def is_unpacked(example_inputs: Any) -> bool:
    """Whether example inputs are the rows of one tensor, as ``tuple(x)`` gives them where ``(x,)`` was meant."""
    if not isinstance(example_inputs, (tuple, list)) or not all(isinstance(x, Tensor) for x in example_inputs):
        return False
    bases = {id(x._base) for x in example_inputs}
    base = example_inputs[0]._base if len(bases) == 1 else None
    return base is not None and base.shape == (len(example_inputs), *example_inputs[0].shape)


def fresh_tensors(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """The inputs as tensor objects of our own: export marks the objects it is given as dynamic, for good.

    A repeated tensor is copied, since torch would take ``f(x, x)`` for a function of one input.
    """
    seen: set[int] = set()

    def fresh(x: Tensor) -> Tensor:
        repeated = id(x) in seen
        seen.add(id(x))
        return x.detach().clone() if repeated else x.data

    return tree_map_only(Tensor, fresh, inputs)


def tensors_of(tree: Any) -> Iterator[Tensor]:
    """The tensors in a nest of tuples, lists and dicts, in order."""
    return (leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def resize_batch(inputs: tuple[Any, Any], batch: int, size: int) -> tuple[Any, Any]:
    """The inputs with a batch of ``size``: tensors of ``batch`` rows are cut, or their one row is repeated."""

    def resize(x: Tensor) -> Tensor:
        if not x.dim() or x.shape[0] != batch:
            return x
        return x[:size] if size <= batch else torch.cat([x] * size)

    return tree_map_only(Tensor, resize, inputs)
