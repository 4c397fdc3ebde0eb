"""``spec`` <-> ``state_dict()["activation_post_process_0/spec"]``: how a tensor is quantized, in a state dict.

A scale means nothing without it: that of 4 bits is sixteen times that of 8. So states of another configuration are
refused, by the name of the key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qpass.arithmetic.numerics import dtype_name
from qpass.errors import StateError
from qpass.spec.fake_quantize import FakeQuantizeBase


def keep_specs(prepared: nn.Module) -> None:
    """Make the specs of the fake-quantize modules of a prepared model part of its state dict."""
    prepared.register_state_dict_post_hook(_save)
    prepared.register_load_state_dict_pre_hook(_load)


def as_tensor(text: str) -> Tensor:
    """A text as a uint8 tensor of its characters, which any file format for tensors can hold."""
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def text_of(value: Any) -> str:
    """The text of such a tensor; of anything else what it is."""
    if isinstance(value, Tensor) and value.dtype == torch.uint8 and not value.is_meta:
        return bytes(value.flatten().tolist()).decode(errors="replace")
    return described(value)


def described(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of {dtype_name(value.dtype)} {list(value.shape)}" + (" on meta" if value.is_meta else "")
    return f"a {type(value).__name__}"


def not_of(model: nn.Module, faults: Iterable[str]) -> StateError:
    """The error for a state that does not fit ``model``; each fault starts with its key."""
    return StateError(
        f"the state dict is of another model or configuration than this {type(model).__name__}, and was not loaded",
        where="\n         ".join(faults),
        hint="load it into a model that was prepared with the configuration it was saved under",
    )


def _specs(prepared: nn.Module, prefix: str) -> Iterator[tuple[str, str]]:
    for name, module in prepared.named_modules():
        if isinstance(module, FakeQuantizeBase):
            yield f"{prefix}{name.replace('.', '/')}/spec", module.spec.written


def _save(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    state.update({key: as_tensor(spec) for key, spec in _specs(module, prefix)})


def _load(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: list[str], *_: Any
) -> None:
    own = dict(_specs(module, prefix))
    saved = {key: text_of(state.pop(key)) for key in own if key in state}
    faults = [
        f"{key}: the state is of {theirs}, and this model rounds to {own[key]}"
        for key, theirs in saved.items() if theirs != own[key]
    ]  # fmt: skip
    if faults:
        raise not_of(module, faults)
    missing += [key for key in own if key not in saved]
