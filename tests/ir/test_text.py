from __future__ import annotations

import operator

import torch
from torch import fx, nn

from pipeline_run import STATIC, Do, run_stages
from qpass.capture.export import capture
from qpass.ir.text import graph_text, target_name


def test_one_line_a_node_constants_by_name() -> None:
    gm = capture(Do(lambda m, x: torch.cat([m.body[0](x), x.to(torch.float64).float()], -1),
                    body=nn.Sequential(nn.Linear(4, 4))), (torch.randn(3, 4),))  # fmt: skip
    lines = [line for line in graph_text(gm).splitlines() if "_assert" not in line]
    assert lines[0] == "inputs_0 = input"
    assert lines[-5:] == [
        "linear = linear(inputs_0, body.0.weight, body.0.bias)",
        "to = to.dtype(inputs_0, float64)",
        "to_1 = to.dtype(to, float32)",
        "cat = cat([linear, to_1], -1)",
        "return [cat]",
    ]


def test_numbers_are_short_and_keywords_named() -> None:
    gm = capture(Do(lambda m, x: torch.add(x, x, alpha=1 / 3)), (torch.randn(3, 4),))
    assert "add = add.Tensor(inputs_0, inputs_0, alpha=0.333333)" in graph_text(gm)


def test_shapes_on_request() -> None:
    gm = run_stages(nn.Linear(4, 2), torch.randn(3, 4), config=STATIC).quantized
    text = graph_text(gm, shapes=True).splitlines()
    assert text[0].endswith("# float32[2, 4]")
    assert text[-2].startswith("linear = linear(")
    symbol = gm.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    assert text[-2].endswith(f"# float32[{symbol}, 2]")


def test_the_text_is_the_same_for_the_same_model() -> None:
    texts = []
    for _ in range(2):
        torch.manual_seed(0)
        texts.append(graph_text(run_stages(nn.Linear(4, 2), torch.randn(3, 4)).lowered))
    assert texts[0] == texts[1]


def test_names_of_operators() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    calls = {
        torch.ops.aten.relu.default: "relu",
        torch.ops.aten.add.Tensor: "add.Tensor",
        torch.ops.quantized_decomposed.quantize_per_tensor.default: "quantize_per_tensor",
        torch.ops.onednn.qlinear_pointwise.binary: "onednn.qlinear_pointwise.binary",
        operator.getitem: "getitem",
    }
    assert {target: target_name(graph.call_function(target, (x,))) for target in calls} == calls
    assert target_name(graph.call_module("activation_post_process_0", (x,))) == "activation_post_process_0"
    assert target_name(x) == "x"
