"""Constants, sub-modules and holders of a module, by dotted name: reading, registering, free names."""

from __future__ import annotations

from typing import Any

import torch

from qpass.ir.origins import is_known


def get_constant(gm: torch.nn.Module, name: str) -> torch.Tensor:
    """The tensor behind a dotted ``get_attr`` target."""
    found: Any = gm
    for part in name.split("."):
        found = getattr(found, part)
    return found


def set_constant(gm: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Register ``value`` as a buffer at a dotted name, making the sub-modules on the way."""
    *path, leaf = name.split(".")
    owner: torch.nn.Module = gm
    for part in path:
        child = getattr(owner, part, None)
        if not isinstance(child, torch.nn.Module):
            child = torch.nn.Module()
            owner.add_module(part, child)
        owner = child
    owner.register_buffer(leaf, value)


def free_name(gm: torch.nn.Module, name: str) -> str:
    """``name``, or ``name_1``, ``name_2``, ... whichever is not taken and was never a constant's.

    Dots become underscores where an attribute of every module stands in the way, as one called ``train`` does.
    """
    if not _may_hold(gm, name):
        name = name.replace(".", "_")
    candidate, number = name, 0
    while is_taken(gm, candidate) or is_known(gm, candidate):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def _may_hold(gm: torch.nn.Module, name: str) -> bool:
    """Whether every holder on the way to ``name`` is a module, or may become one."""
    found: Any = gm
    for part in name.split(".")[:-1]:
        found = getattr(found, part, torch.nn.Module())
        if not isinstance(found, torch.nn.Module):
            return False
    return True


def is_taken(gm: torch.nn.Module, name: str) -> bool:
    """Whether the module has an attribute at a dotted name."""
    found: Any = gm
    for part in name.split("."):
        if not hasattr(found, part):
            return False
        found = getattr(found, part)
    return True


def owner_of(gm: torch.nn.Module, name: str) -> tuple[torch.nn.Module, str]:
    """The sub-module that holds the dotted attribute ``name``, and the attribute's last part."""
    path, _, leaf = name.rpartition(".")
    return gm.get_submodule(path), leaf


def take_over(module: torch.nn.Module, other: torch.nn.Module) -> None:
    """Let ``module`` hold the parameters, buffers and sub-modules of ``other``."""
    module._parameters.update(other._parameters)
    module._buffers.update(other._buffers)
    module._modules.update(other._modules)
    module._non_persistent_buffers_set |= other._non_persistent_buffers_set


def holder(module: torch.nn.Module) -> torch.nn.Module:
    """A module that computes nothing and holds what ``module`` holds; holders inside it are new ones, too."""
    result = torch.nn.Module()
    take_over(result, module)
    for name, child in result._modules.items():
        if type(child) is torch.nn.Module:
            result._modules[name] = holder(child)
    return result


def replace_submodule(gm: torch.nn.Module, name: str, module: torch.nn.Module) -> None:
    """Put ``module`` in the place of the sub-module at a dotted name."""
    owner, leaf = owner_of(gm, name)
    setattr(owner, leaf, module)


def is_persistent(gm: torch.nn.Module, name: str) -> bool:
    """Whether the buffer at a dotted name is part of the state dict."""
    owner, leaf = owner_of(gm, name)
    return leaf not in owner._non_persistent_buffers_set
