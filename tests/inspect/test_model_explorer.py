"""The files for Model Explorer have the fields, the types and the references that its published interfaces ask for.

``GraphCollection``, ``Graph``, ``GraphNode``, ``IncomingEdge``, ``MetadataItem``, ``KeyValue`` (its ``input_graph.ts``
and ``types.ts``), ``NodeDataProviderGraphData`` with its results and gradient, and ``SyncNavigationData``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass

NUMBER = (int, float)
COLOUR = re.compile(r"#[0-9a-f]{6}")
INTERFACES: dict[str, dict[str, Any]] = {  # a field, optional with "?": a type, [interface], or a check
    "KeyValue": {"key": str, "value": str},
    "MetadataItem": {"id": str, "attrs": ["KeyValue"]},
    "IncomingEdge": {"sourceNodeId": str, "sourceNodeOutputId": str, "targetNodeInputId": str},
    "GraphNode": {
        "id": str, "label": str, "namespace": str, "subgraphIds?": [str], "attrs?": ["KeyValue"],
        "incomingEdges?": ["IncomingEdge"], "inputsMetadata?": ["MetadataItem"], "outputsMetadata?": ["MetadataItem"],
    },
    "Graph": {"id": str, "nodes": ["GraphNode"]},
    "GraphCollection": {"label": str, "graphs": ["Graph"]},
    "ResultData": {"value": (*NUMBER, str), "bgColor?": COLOUR, "textColor?": COLOUR},
    "GradientItem": {"stop": NUMBER, "bgColor?": COLOUR, "textColor?": COLOUR},
    "GraphData": {"results": {"ResultData"}, "gradient?": ["GradientItem"]},
    "SyncNavigationData": {
        "type": re.compile("sync_navigation"), "mapping": {str}, "disableMappingFallback?": bool,
    },
}  # fmt: skip


def conform(value: Any, to: Any, where: str = "") -> None:
    """`value` is what the field or interface `to` says; a list or a set of one holds it in an array or a record."""
    if isinstance(to, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            conform(item, to[0], f"{where}[{index}]")
    elif isinstance(to, set):
        assert isinstance(value, dict), where
        for key, item in value.items():
            conform(item, *to, f"{where}[{key}]")
    elif isinstance(to, str):
        fields = INTERFACES[to]
        assert isinstance(value, dict), where
        assert value.keys() <= {name.rstrip("?") for name in fields}, where
        assert value.keys() >= {name for name in fields if not name.endswith("?")}, where
        for name, field in fields.items():
            if name.rstrip("?") in value:
                conform(value[name.rstrip("?")], field, f"{where}.{name}")
    elif isinstance(to, re.Pattern):
        assert to.fullmatch(value), where
    else:
        assert isinstance(value, to), where


class Net(nn.Module):
    """Two outputs of one node, a region, and a constant of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        low, high = self.first(x).chunk(2, -1)
        return torch.cond(x.sum() > 0, lambda y: self.second(y), lambda y: self.second(y).relu(), (low,)) + high


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    prepared = qpass.prepare(Net().eval(), (torch.randn(2, 8),), config=qpass.presets.int8_dynamic(compute_dtype=None))
    quantized = qpass.convert(prepared)
    folder = tmp_path_factory.mktemp("explorer")
    values = {"linear": 31.5, "chunk": float("inf"), "add": float("nan")}
    qpass.diff(prepared, quantized).with_metric("sqnr", values).to_model_explorer(folder)
    return {path.stem: json.loads(path.read_text(), parse_constant=pytest.fail) for path in Path(folder).iterdir()}


def test_fields_and_types(files: dict[str, Any]) -> None:
    assert files.keys() == {"before", "after", "mapping", "changes", "sqnr"}
    for name in ("before", "after"):
        conform(files[name], "GraphCollection", name)
    conform(files["mapping"], "SyncNavigationData", "mapping")
    for name in ("changes", "sqnr"):
        conform(files[name], {"GraphData"}, name)
    stops = [item["stop"] for item in files["sqnr"]["after"]["gradient"]]
    assert stops == sorted(stops)
    assert (stops[0], stops[-1]) == (0, 1)


def test_references(files: dict[str, Any]) -> None:
    """Ids are unique; edges lead from an output of a node of the graph; data belong to graphs and nodes by id."""
    graphs = {graph["id"]: graph["nodes"] for name in ("before", "after") for graph in files[name]["graphs"]}
    nodes = {name: {node["id"]: node for node in graph} for name, graph in graphs.items()}
    for name, graph in graphs.items():
        assert len(nodes[name]) == len(graph)
        for node in graph:
            assert not re.search(r"^/|//|/$", node["namespace"])
            assert len({edge["targetNodeInputId"] for edge in node["incomingEdges"]}) == len(node["incomingEdges"])
            for edge in node["incomingEdges"]:
                source = nodes[name][edge["sourceNodeId"]]
                given = {output["id"] for output in source["outputsMetadata"]}
                assert edge["sourceNodeOutputId"] in given or not given
    for name in ("changes", "sqnr"):
        for graph, data in files[name].items():
            assert data["results"].keys() <= nodes[graph].keys()
    mapping = files["mapping"]["mapping"]
    assert mapping.keys() <= nodes["before"].keys()
    assert set(mapping.values()) <= nodes["after"].keys()
    assert files["sqnr"]["after"]["results"]["linear"] == {"value": 31.5}
