"""Programs in files: opening a ``.pt2``, and the records of qpass that are saved in it.

A record is kept in ``node.meta["custom"]["qpass"]``, which torch writes into the file with the node; the stage and the
target lie beside the program as an extra file, with the number of the format.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

import qpass.arithmetic  # noqa: F401  (a file with q/dq operators opens only where they are registered)
from qpass.arithmetic.numerics import dtype_name
from qpass.errors import InputError
from qpass.ir.record import NodeRecord, Stage, record_of

FORMAT = 2
"""The format of what qpass writes beside a program; raise it when a key or a field of `NodeRecord` changes."""

EXTRA = "qpass.json"
CUSTOM = "custom"
KEY = "qpass"
MADE_BY = "qpass_made_by"


def open_program(path: str | os.PathLike[str]) -> ExportedProgram:
    """The program in a ``.pt2`` file, q/dq operators included.

    torch executes code while it opens such a file: open only files whose origin you trust.

    Raises:
        InputError: there is no such file, it holds no exported program, or a newer qpass wrote it.
    """
    if not Path(path).is_file():
        raise InputError(f"there is no file {str(path)!r}", hint="write one with qpass.save or torch.export.save")
    refuse_newer(path)
    extra = {EXTRA: ""}
    try:
        program = torch.export.load(os.fspath(path), extra_files=extra)
    except Exception as error:
        raise InputError(
            f"{str(path)!r} holds no exported program that can be opened: {type(error).__name__}: {error}",
            hint="write it with qpass.save or torch.export.save, with this version of torch",
        ) from error
    program.graph_module.meta[EXTRA] = json.loads(extra[EXTRA] or "{}")
    return program


def refuse_newer(path: str | os.PathLike[str]) -> None:
    """Raise InputError where the file has a format that this qpass does not know, before torch opens the file.

    A file without a format is not qpass's, or older than formats, which are read as the first one.
    """
    found = _extra_file(path).get("format", FORMAT)
    if not isinstance(found, int) or not 1 <= found <= FORMAT:
        raise InputError(
            f"{str(path)!r} has format {found!r}, and this qpass reads formats 1 to {FORMAT}",
            hint="install the qpass that wrote the file, or a newer one; or save the model again with this one",
        )


def _extra_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What qpass wrote beside the program in the file; empty where there is nothing of qpass's."""
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/extra/{EXTRA}")), "")
        found = json.loads(archive.read(name)) if name else {}
    return found if isinstance(found, dict) else {}


def kept_stage(program: ExportedProgram) -> Stage | str:
    """The stage that the file of ``program`` names, or ``""``."""
    found: str = program.graph_module.meta.get(EXTRA, {}).get("stage", "")
    return found


def kept_record(node: fx.Node) -> NodeRecord | None:
    """The decision about ``node``: kept on it in this process, or in the file it came from."""
    found = record_of(node)
    if found is not None or CUSTOM not in node.meta:
        return found
    kept = node.meta[CUSTOM].get(KEY) if isinstance(node.meta[CUSTOM], dict) else None
    if not isinstance(kept, dict):
        return None
    dtype = kept.get("compute_dtype")
    return NodeRecord(**kept | {"compute_dtype": getattr(torch, dtype) if dtype else None})


def kept_maker(node: fx.Node) -> str:
    """The pass that made ``node``, ``""`` where nothing is recorded or torch only traced the graph again."""
    origin, custom = node.meta.get("from_node"), node.meta.get(CUSTOM)
    if isinstance(custom, dict) and MADE_BY in custom:
        return str(custom[MADE_BY])
    name: str = origin[-1].pass_name if origin else ""
    return "" if name.startswith(("Interpreter", "ExportedProgram.")) else name


def as_kept(record: NodeRecord) -> dict[str, Any]:
    """``record`` in strings and numbers, as it travels in a file."""
    dtype = record.compute_dtype
    return asdict(record) | {"compute_dtype": dtype_name(dtype) if dtype else None}
