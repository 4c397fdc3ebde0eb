"""What training changes is found by tracing both modes, whoever changes it; anything else is refused by its line."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interpret import operators
from pipeline_run import Do
from qpass.capture.export import capture
from qpass.capture.training import capture_training
from qpass.errors import CaptureError, InputError
from qpass.ir.training_modules import BY_MODE, TrainingChange

X = torch.randn(4, 6)


def modes(model: nn.Module, x: Tensor = X) -> dict[str, TrainingChange]:
    return {n.name: n.meta[BY_MODE] for n in capture_training(model, (x,)).graph.nodes if BY_MODE in n.meta}


def test_the_graph_is_that_of_evaluation_with_dropout_on() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6, eps=1e-3, momentum=0.3), nn.Dropout(0.25)).train()
    gm = capture_training(model, (X,))
    assert (
        operators(gm)
        == """\
input_1 = input
linear = linear(input_1, 0.weight, 0.bias)
batch_norm = batch_norm(linear, 1.weight, 1.bias, 1.running_mean, 1.running_var, False, 0.3, 0.001, False)
dropout = dropout(batch_norm, 0.25, True)
return [dropout]"""
    )
    marks = {node.name: node.meta[BY_MODE] for node in gm.graph.nodes if BY_MODE in node.meta}
    assert marks == {
        "batch_norm": TrainingChange(True, momentum=0.3, tracked="1.num_batches_tracked"),
        "dropout": TrainingChange(True, p=0.25),
    }
    assert marks["batch_norm"].count is model[1].num_batches_tracked
    assert [module.training for module in model.modules()] == [True] * 4


def test_the_modes_of_the_model_are_kept_module_by_module() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Dropout(0.1)).train()
    model[1].eval()
    assert [mode.training for mode in modes(model).values()] == [True, False, True]
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_a_functional_call_counts_where_the_user_made_it_depend_on_the_mode() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(6))
            self.register_buffer("var", torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            x = F.batch_norm(x, self.mean, self.var, training=self.training, momentum=0.2)
            x = F.dropout(x, 0.5, training=self.training)
            return F.dropout(x, 0.25, training=False)

    assert modes(Model().train()) == {
        "batch_norm": TrainingChange(True, momentum=0.2),
        "dropout": TrainingChange(True, p=0.5),
    }


def test_dropout_inside_attention_is_found() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True).train()
    found = modes(layer, torch.randn(2, 5, 8))
    assert found == dict.fromkeys(found, TrainingChange(True, p=0.1))
    assert list(found) == ["scaled_dot_product_attention", "dropout", "dropout_1", "dropout_2"]


def test_dropout_in_place_becomes_plain() -> None:
    found = modes(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1, inplace=True)).train())
    assert found == {"dropout_": TrainingChange(True, p=0.1)}

    def forward(m: nn.Module, x: Tensor) -> Tensor:
        y = m.fc(x)
        rows = y.unbind()
        F.dropout(y, 0.1, m.training, inplace=True)
        return rows[0]

    model = Do(forward, fc=nn.Linear(6, 6))
    with pytest.raises(CaptureError, match="overwrites a value that is read elsewhere"):
        capture_training(model, (X,))


def test_an_average_over_all_batches_and_a_norm_without_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(6, momentum=None), nn.BatchNorm1d(6, track_running_stats=False)).train()
    assert modes(model) == {"batch_norm": TrainingChange(True, momentum=None, tracked="0.num_batches_tracked")}


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_will_do(batch: int) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).train()
    gm, twin = capture_training(model, (torch.randn(batch, 6),)), capture(model.eval(), (torch.randn(batch, 6),))
    for size in (1, 2, 5):
        x = torch.randn(size, 6)
        assert torch.equal(gm(x), twin(x))


def test_nothing_of_the_model_is_touched() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    capture_training(model, (X,))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_another_path_in_training_is_refused_by_its_line() -> None:
    def forward(m: nn.Module, x: Tensor) -> Tensor:
        x = m.fc(x)
        if m.training:
            x = torch.tanh(x)
        return x

    model = Do(forward, fc=nn.Linear(6, 6)).train()
    with pytest.raises(CaptureError) as caught:
        capture_training(model, (X,))
    assert "computes something else in training than in evaluation: tanh" in str(caught.value)
    assert "x = torch.tanh(x)" in str(caught.value)
    assert model.training
    assert model.fc.training


def test_what_was_traced_in_one_mode_is_refused() -> None:
    model = nn.Linear(6, 6)
    for traced in (torch.export.export(model, (X,)), capture(model, (X,))):
        with pytest.raises(InputError, match="was traced in one mode"):
            capture_training(traced, (X,))  # type: ignore[arg-type]


def test_a_synchronised_norm_is_refused_by_name() -> None:
    with pytest.raises(CaptureError) as caught:
        capture_training(nn.Sequential(nn.Linear(6, 6), nn.SyncBatchNorm(6)), (X,))
    assert "SyncBatchNorm cannot be trained quantized" in str(caught.value)
    assert caught.value.where == "1"
