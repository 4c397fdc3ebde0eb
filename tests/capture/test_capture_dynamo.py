"""A Dynamo graph becomes ATen with the user's weights as constants, and keeps the names of things."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import gelu

from qpass.capture.dynamo import DynamoCapture, from_dynamo
from qpass.ir.attributes import get_constant
from qpass.ir.source import module_path, source_line

aten = torch.ops.aten


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.BatchNorm1d(8)])
        self.graph = nn.Linear(8, 8)  # a name that GraphModule uses itself
        self.offset = torch.ones(8)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.view(-1).add_(1)
        for layer in self.layers:
            x = layer(x)
        return self.graph(gelu(x)) + self.offset


def capture(model: nn.Module, *inputs: Any, dynamic: bool | None = None) -> tuple[DynamoCapture, list[Any]]:
    """What a backend sees when ``model`` is called without gradients."""
    found: list[tuple[DynamoCapture, list[Any]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Any:
        found.append((from_dynamo(gm, example_inputs), list(example_inputs)))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (captured,) = found
    return captured


def test_weights_are_the_users_tensors_under_the_users_names() -> None:
    model = Block().eval()
    captured, arguments = capture(model, torch.randn(4, 8))
    gm = captured.graph_module
    assert set(captured.bindings) == {
        "layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "layers.1.running_mean",
        "layers.1.running_var", "graph_weight", "graph_bias", "offset",
    }  # fmt: skip
    assert get_constant(gm, "layers.0.weight") is model.layers[0].weight
    for name, position in captured.bindings.items():
        assert get_constant(gm, name) is arguments[position]
    assert sorted([*captured.inputs, *captured.bindings.values()]) == list(range(len(arguments)))


def test_operations_are_whole_and_keep_their_place() -> None:
    captured, _ = capture(Block().eval(), torch.randn(4, 8))
    nodes = {node.target: node for node in captured.graph_module.graph.nodes if node.op == "call_function"}
    assert {aten.linear.default, aten.batch_norm.default, aten.gelu.default} < set(nodes)
    assert module_path(nodes[aten.batch_norm.default]) == "layers.1"
    assert source_line(nodes[aten.gelu.default]).endswith("return self.graph(gelu(x)) + self.offset")
    assert nodes[aten.gelu.default].meta["val"].shape == (4, 8)
    assert "from_node" in nodes[aten.gelu.default].meta


def test_state_that_the_graph_writes_is_no_constant() -> None:
    model = Block()
    for training, state in (
        (False, {"calls"}),
        (True, {"calls", "running_mean", "running_var", "num_batches_tracked"}),
    ):
        torch._dynamo.reset()
        captured, arguments = capture(model.train(training), torch.randn(4, 8))
        tensors = [arguments[position] for position in captured.inputs]
        kept = {name for name, buffer in model.named_buffers() if any(buffer is tensor for tensor in tensors)}
        assert {name.rpartition(".")[2] for name in kept} == state


def test_what_shares_memory_with_what_the_graph_writes_is_no_constant() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("base", torch.zeros(4, 8))
            self.register_buffer("row", self.base[1])

        def forward(self, x: Tensor) -> Tensor:
            self.row.copy_(x[0])
            return self.fc(self.base)

    model = Rows().eval()
    captured, arguments = capture(model, torch.randn(4, 8))
    constants = [arguments[position] for position in captured.bindings.values()]
    assert {id(tensor) for tensor in constants} == {id(model.fc.weight), id(model.fc.bias)}


def test_layers_in_a_dict_may_have_names_that_every_module_has() -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = {"train": nn.Linear(8, 8), "parameters": nn.Linear(8, 8)}

        def forward(self, x: Tensor) -> Tensor:
            return self.heads["train"](x) + self.heads["parameters"](x)

    model = Heads().eval()
    captured, _ = capture(model, torch.randn(4, 8))
    held = [get_constant(captured.graph_module, name) for name in captured.bindings]
    assert {id(tensor) for tensor in held} == {id(p) for head in model.heads.values() for p in head.parameters()}


def test_sizes_stay_symbols_and_floats_are_specialized_where_an_operator_needs_them() -> None:
    captured, _ = capture(Block().eval(), torch.randn(5, 8), dynamic=True)
    graph = captured.graph_module.graph
    (norm,) = graph.find_nodes(op="call_function", target=aten.batch_norm.default)
    assert norm.args[6:8] == (0.1, 1e-5)
    batch = norm.meta["val"].shape[0]
    assert isinstance(batch, torch.SymInt)
    symbols = [node.meta["val"] for node in graph.find_nodes(op="placeholder")]
    assert any(isinstance(value, torch.SymInt) and value.node.expr == batch.node.expr for value in symbols)


def test_regions_are_captured_with_the_rest() -> None:
    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: self.fc(x), lambda x: x.relu(), (x,))

    captured, _ = capture(Loop(), torch.randn(4, 8))
    (cond,) = captured.graph_module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond)
    body = get_constant(captured.graph_module, cond.args[1].target)
    assert body.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert {"fc.weight", "fc.bias"} == set(captured.bindings)
