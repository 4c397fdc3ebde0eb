"""Where a node comes from: the user's module and the user's line, in the words that errors and reports use.

Export spells a module path ``encoder.layers.0``; Dynamo spells the same ``L['self'].encoder.layers.0`` or
``L['fn']._modules['encoder'].layers[0]``. Both read ``encoder.layers.0`` here.
"""

from __future__ import annotations

import functools
import os
import re
import sysconfig
from typing import Any

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__) + os.sep
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_INSTALLED = f"{os.sep}site-packages{os.sep}"
_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n?(?P<code>.*)$', re.MULTILINE)

_ROOT = re.compile(r"^[LG]\['\w+'\]")
_GETATTR = re.compile(r"getattr\((.*), ['\"](\w+)['\"]\)")
_MODULES = re.compile(r"\._(?:modules|parameters|buffers)(?=\[)")
_INDEX = re.compile(r"\[['\"]?([^\]'\"]+)['\"]?\]")


def module_stack(node: fx.Node) -> tuple[tuple[str, Any], ...]:
    """``((path, type), ...)`` of the modules around a node, outermost first; the root's path is ``""``.

    A type is a class, or its qualified name as text where export left only that. A node of a backward graph stands
    where the node stood whose gradient it computes.
    """
    return tuple((clean_path(path), kind) for path, kind in _stack(node).values())


def module_path(node: fx.Node) -> str:
    """The dotted path of the innermost module around a node; ``""`` at the root and where none is known."""
    stack = _stack(node)
    return clean_path(next(reversed(stack.values()))[0]) if stack else ""


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    return node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}


def source_line(node: fx.Node) -> str:
    """``"file.py:123: code"`` of the user's innermost frame; ``""`` where only torch's own or generated code is."""
    return user_line(node.meta.get("stack_trace") or "")


def where(node: fx.Node) -> str:
    """The place of a node as every error and report writes it: ``"encoder.0 (linear_3), model.py:12: x = f(x)"``."""
    path, line = module_path(node), source_line(node)
    place = f"{path} ({node.name})" if path else node.name
    return f"{place}, {line}" if line else place


@functools.lru_cache(maxsize=4096)
def clean_path(path: str) -> str:
    """A module path as the user would write it behind ``model.``."""
    while (found := _GETATTR.search(path)) is not None:
        path = path[: found.start()] + f"{found[1]}.{found[2]}" + path[found.end() :]
    return _INDEX.sub(r".\1", _MODULES.sub("", _ROOT.sub("", path))).strip(".")


@functools.lru_cache(maxsize=4096)
def user_line(stack_trace: str) -> str:
    """``"file.py:123: code"`` of the innermost frame of a printed stack that is neither torch's nor generated."""
    for frame in reversed(list(_FRAME.finditer(stack_trace))):
        if is_user_file(frame["file"]):
            code = frame["code"].strip()
            location = f"{os.path.basename(frame['file'])}:{frame['line']}"
            return f"{location}: {code}" if code else location
    return ""


def is_user_file(path: str) -> bool:
    """Whether a frame of this file is the user's or a library's, and not torch's, Python's or generated code's."""
    if path.startswith(("<", _TORCH)):
        return False
    return _INSTALLED in path or not path.startswith(_PYTHON)
