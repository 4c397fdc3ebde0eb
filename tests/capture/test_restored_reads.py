"""What stands in front of a dropout is read in training where the trace in evaluation reads dropout's result."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import export

from interpret import operators
from pipeline_run import Do
from qpass.capture.restored_reads import restore_reads
from qpass.capture.training import capture_training
from qpass.ir.training_modules import BY_MODE


def traces(x: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    model = Do(lambda m, x: m.fc(m.drop(m.first(x))) + m.second(x), fc=nn.Linear(4, 4),
               first=nn.Dropout(0.1), drop=nn.Dropout(0.2), second=nn.Dropout(0.3)).eval()  # fmt: skip
    ours, theirs = (export(model, (x,)).module(check_guards=False) for _ in range(2))
    return ours, theirs


def test_reads_of_a_dropouts_result_become_those_of_training() -> None:
    """As torch 2.15 traces it: the last dropout reads the result of the second, which is x in evaluation."""
    ours, theirs = traces(torch.randn(3, 4))
    for trace, behind in ((ours, True), (theirs, False)):
        first, second, third = trace.graph.find_nodes(op="call_function", target=torch.ops.aten.dropout.default)
        third.args = (second if behind else first.args[0], *third.args[1:])
    expected = operators(theirs)
    assert operators(ours) != expected
    assert restore_reads(ours, theirs) == 1
    assert operators(ours) == expected
    assert restore_reads(ours, theirs) == 0


def test_a_reader_of_both_sides_trains_on_what_the_model_reads() -> None:
    model = Do(lambda m, x: m.fc(m.drop(x)) + x, fc=nn.Linear(4, 4), drop=nn.Dropout(1.0)).train()
    gm = capture_training(model, (x := torch.randn(3, 4),))
    add = next(node for node in gm.graph.nodes if node.target is torch.ops.aten.add.Tensor)
    assert add.args[1].op == "placeholder"
    (dropout,) = (node for node in gm.graph.nodes if BY_MODE in node.meta)
    assert dropout.args[0] is add.args[1]
    torch.testing.assert_close(model(x), model.fc.bias.expand_as(x) + x)  # all is dropped but the shortcut
