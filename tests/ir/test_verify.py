from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from pipeline_run import Do, run_stages
from qpass.capture.export import capture
from qpass.errors import VerifyError
from qpass.ir.editor import Editor
from qpass.ir.record import STAGES
from qpass.ir.verify import verify
from qpass.ops import graph_ops as ops


def captured() -> fx.GraphModule:
    return capture(Do(lambda m, x: torch.relu(x)), (torch.randn(3, 4),))


def fault(gm: fx.GraphModule, stage: Any) -> str:
    with pytest.raises(VerifyError) as found:
        verify(gm, stage)
    return found.value.what


def test_what_the_road_makes_is_valid_at_its_stage() -> None:
    r = run_stages(nn.Linear(4, 4), torch.randn(3, 4))
    graphs = {"captured": captured(), "prepared": r.prepared, "quantized": r.quantized, "lowered": r.lowered}
    for stage in STAGES:
        verify(graphs[stage], stage)


@pytest.mark.parametrize(
    ("made", "claimed", "expected"),
    [
        ("prepared", "captured", "calls a sub-module, and a captured graph calls none"),
        ("prepared", "quantized", "calls a sub-module, and a quantized graph calls none"),
        ("quantized", "prepared", "appears before convert"),
        ("lowered", "prepared", "appears before convert"),
    ],
)
def test_a_stage_does_not_pass_for_another(made: str, claimed: Any, expected: str) -> None:
    gm = getattr(run_stages(nn.Linear(4, 4), torch.randn(3, 4)), made)
    assert fault(gm, claimed).endswith(expected)


def quantize(*qparams: Any) -> fx.GraphModule:
    gm = captured()
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    codes = Editor(gm).call(ops.quantize_per_tensor.default, relu, *qparams, like=relu, after=relu)
    gm.graph.output_node().args = ((codes,),)
    return gm


BYTE = (0, 255, torch.uint8)
NAME = "the quantized graph is not valid: quantize_per_tensor_default (quantize_per_tensor)"


@pytest.mark.parametrize(
    ("qparams", "expected"),
    [
        ((0.0, 0, *BYTE), "has the scale 0.0; scales are positive and finite"),
        ((-0.1, 0, *BYTE), "has the scale -0.1; scales are positive and finite"),
        ((float("inf"), 0, *BYTE), "has the scale inf; scales are positive and finite"),
        ((float("nan"), 0, *BYTE), "has the scale nan; scales are positive and finite"),
        ((0.1, 256, *BYTE), "has the zero point 256 outside 0..255"),
        ((0.1, -1, *BYTE), "has the zero point -1 outside 0..255"),
        ((0.1, 3, 5, 5, torch.uint8), "has the empty quant range 5..5"),
    ],
)
def test_odd_qparams(qparams: tuple[Any, ...], expected: str) -> None:
    assert fault(quantize(*qparams), "quantized") == f"{NAME} {expected}"


def test_good_qparams() -> None:
    verify(quantize(0.1, 255, *BYTE), "quantized")


def test_kernels_before_lowering() -> None:
    gm = captured()
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.target = torch.ops.onednn.qlinear_pointwise.default
    assert fault(gm, "prepared").endswith("is a kernel of a target, and nothing is lowered yet")


def test_a_sub_module_that_is_no_observer() -> None:
    gm = captured()
    gm.add_module("dropout", nn.Dropout())
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    Editor(gm).module("dropout", relu, like=relu, before=relu.next)
    expected = "calls a sub-module that is neither an observer nor one of qpass.ir.training_modules"
    assert fault(gm, "prepared") == f"the prepared graph is not valid: dropout (dropout) {expected}"


def test_method_calls() -> None:
    gm = captured()
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    with gm.graph.inserting_after(relu):
        gm.graph.call_method("relu", (relu,))
    assert fault(gm, "captured").endswith("is a method call, and the graph holds operators only")


def test_an_operator_without_a_val_is_found_with_its_place() -> None:
    gm = captured()
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    del relu.meta["val"]
    with pytest.raises(VerifyError) as found:
        verify(gm, "captured")
    assert found.value.what == 'the captured graph is not valid: relu (relu) has no meta["val"]'
    assert found.value.where is not None
    assert found.value.where.startswith("relu, ")


def test_regions_are_verified_too() -> None:
    model = Do(lambda m, x: torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y.relu(), (x,)))
    gm = capture(model, (torch.randn(3, 4),))
    (sin,) = gm.true_graph_0.graph.find_nodes(op="call_function", target=torch.ops.aten.sin.default)
    del sin.meta["val"]
    assert fault(gm, "captured") == 'the captured graph is not valid: sin (sin) has no meta["val"]'


def test_a_graph_that_uses_a_value_before_it_exists_is_no_graph() -> None:
    gm = captured()
    (relu,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
    relu.append(relu.args[0])
    with pytest.raises(RuntimeError, match="was used before it has been defined"):
        verify(gm, "captured")
