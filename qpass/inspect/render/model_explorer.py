"""A diff as files for Google's Model Explorer: both graphs, how their nodes correspond, and figures as node data.

Open ``before.json`` and ``after.json`` side by side, then load ``mapping.json`` under "Sync navigation" and the other
files as node data.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qpass.inspect.changes.diff_data import DiffData
from qpass.inspect.render.export import number
from qpass.inspect.values.nodes import NodeView, Snapshot

_GRADIENT = [{"stop": 0, "bgColor": "#ffebe9"}, {"stop": 1, "bgColor": "#dafbe1"}]


def write(diff: DiffData, folder: Path) -> None:
    """Write ``before.json``, ``after.json``, ``mapping.json``, ``changes.json`` and a file for each metric."""
    folder.mkdir(parents=True, exist_ok=True)
    _dump(folder / "before.json", _collection("before", diff.before))
    _dump(folder / "after.json", _collection("after", diff.after))
    mapping = {_id(old): _id(new) for old, new in diff.matched}
    _dump(folder / "mapping.json", {"type": "sync_navigation", "mapping": mapping, "disableMappingFallback": True})
    kinds = {_id(change.after): {"value": change.kind} for change in diff.changes if change.after}
    gone = {
        _id(change.before): {"value": "removed"}
        for change in diff.changes
        if change.kind == "removed" and change.before
    }
    _dump(folder / "changes.json", {"after": {"results": kinds}, "before": {"results": gone}})
    for name, values in diff.metrics.items():
        found = {_id(view): {"value": number(values[view.path])} for view in diff.after.nodes if view.path in values}
        plain = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        _dump(folder / f"{plain}.json", {"after": {"results": found, "gradient": _GRADIENT}})


def _collection(label: str, graph: Snapshot) -> dict[str, Any]:
    return {"label": label, "graphs": [{"id": label, "nodes": [_node(view, graph) for view in graph.nodes]}]}


def _node(view: NodeView, graph: Snapshot) -> dict[str, Any]:
    edges = [
        {"sourceNodeId": _id(graph.nodes[source]), "sourceNodeOutputId": "0", "targetNodeInputId": str(position)}
        for position, source in enumerate(view.inputs)
    ]
    told = {"operator": view.operator, "name": view.path, "module": view.module, "line": view.line}
    told |= {"outcome": view.record.outcome, "reason": view.record.reason} if view.record else {}
    outputs = [{"id": "0", "attrs": [{"key": "tensor_shape", "value": view.form}]}] if view.form else []
    return {
        "id": _id(view), "label": view.short, "namespace": "/".join(filter(None, view.module.split("."))),
        "incomingEdges": edges, "outputsMetadata": outputs,
        "attrs": [{"key": key, "value": value} for key, value in told.items() if value],
    }  # fmt: skip


def _id(view: NodeView) -> str:
    return view.path


def _dump(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
