"""Every error a user meets, word for word: what happened, where, and what to do."""

from __future__ import annotations

import pickle
import re
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass import presets
from qpass.errors import (
    CalibrationError,
    CaptureError,
    ConfigError,
    ConvertError,
    InputError,
    LowerError,
    QpassError,
    StrictError,
)  # fmt: skip


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.fc(x)
        return x


class Softmax(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x, -1)


class Integers(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc(x))


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))


X = torch.zeros(2, 4)


def two() -> nn.Module:
    return Two().eval()


def error_of(call: Callable[[], Any], kind: type[QpassError]) -> str:
    """The text of the error, with the numbers of this file's lines left out."""
    with pytest.raises(kind) as raised:
        call()
    assert type(raised.value) is kind
    return re.sub(r"(test_api_errors\.py):\d+", r"\1", str(raised.value))


def prepared(model: nn.Module | None = None, **options: Any) -> Any:
    return qpass.prepare(two() if model is None else model, (X,), **options)


def quantized() -> Any:
    return qpass.convert(qpass.calibrate(prepared(), [torch.randn(8, 4)]))


# prepare


def test_the_model_cannot_be_exported() -> None:
    text = error_of(lambda: prepared(Branching().eval()), CaptureError)
    lines = text.splitlines()
    # the rest of the first line is torch's own
    assert lines[0].startswith("torch.export cannot capture Branching: Could not guard on data-dependent expression")
    assert lines[1:] == [
        "  where: test_api_errors.py: if x.sum() > 0:",
        "  to do: the model decides on the value of a tensor; use torch.cond for a branch, torch.where for a choice of "
        "values, torch._check to bound a size",
    ]


NOTHING = "nothing in this model can be quantized with this configuration\n"
OTHER_PRESET = "  to do: choose another preset (int8_static, int8_dynamic, int8_weight_only) or remove overrides"


def test_nothing_can_be_quantized() -> None:
    assert error_of(lambda: prepared(Softmax()), ConfigError) == (
        NOTHING + "  where: softmax.int: probabilities span many orders of magnitude; "
        "8 bits would flush the small ones to zero (x1)\n" + OTHER_PRESET
    )


def test_overrides_leave_nothing_to_quantize() -> None:
    config = presets.int8_static().keep_float(module_type=nn.Linear)
    assert error_of(lambda: prepared(config=config), ConfigError) == (
        NOTHING + "  where: linear: override 0 of the configuration leaves it in float (x2)\n"
        "         relu: element by element: Inductor fuses it into the loops around it (x1)\n" + OTHER_PRESET
    )


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"module": "secnd"}, "Override 0 (module='secnd') matches nothing in this model (did you mean 'second'?)"),
        ({"op": "linaer"}, "Override 0 (op='linaer') matches nothing in this model (did you mean 'linear'?)"),
        (
            {"module_type": "Linaer"},
            "Override 0 (module_type='Linaer') matches nothing in this model (did you mean 'Linear'?)",
        ),
        ({"module_type": nn.Conv2d}, "Override 0 (module_type='Conv2d') matches nothing in this model"),
    ],
)
def test_an_override_matches_nothing(condition: dict[str, Any], message: str) -> None:
    config = presets.int8_static().keep_float(**condition)
    assert error_of(lambda: prepared(config=config), ConfigError) == (
        f"{message}\n"
        "  to do: correct the name, or remove the override; the first match wins, so an earlier one may hide it"
    )


def test_an_unknown_preset() -> None:
    assert error_of(lambda: qpass.prepare(two(), config="int8_statc"), ConfigError) == (
        "There is no preset 'int8_statc' (did you mean 'int8_static'?)\n"
        "  to do: use one of int8_static, int8_dynamic, int8_weight_only, int8_qat"
    )


def test_an_unknown_target() -> None:
    assert error_of(lambda: prepared(target="x87"), ConfigError) == (
        "unknown target 'x87' (did you mean 'x86'?)\n  to do: use one of x86"
    )


def test_a_group_size_that_does_not_divide() -> None:
    config = presets.int8_weight_only(group_size=3)
    assert error_of(lambda: prepared(config=config), ConfigError) == (
        "the group size 3 does not divide the last dimension of the weight [8, 4]\n"
        "  where: first (linear), test_api_errors.py: return self.second(torch.relu(self.first(x)))\n"
        "  to do: choose a group size that divides 4, or leave this module in float with "
        "config.keep_float(module=...)"
    )
    only_second = presets.int8_weight_only(group_size=8).keep_float(module="first")
    assert prepared(config=only_second)(X).shape == (2, 4)  # what is left in float needs no groups


def test_a_model_in_training_mode() -> None:
    eval_first = "  to do: call model.eval() first; a functional call needs training=self.training"
    assert error_of(lambda: prepared(Dropping()), CaptureError) == (
        "the model is in training mode: dropout behaves as in training\n"
        "  where: drop (dropout), test_api_errors.py: return self.drop(self.fc(x))\n" + eval_first
    )
    assert error_of(lambda: prepared(Normed()), CaptureError) == (
        "the model is in training mode: batch_norm behaves as in training\n"
        "  where: bn (batch_norm), test_api_errors.py: return self.bn(self.fc(x))\n" + eval_first
    )


def test_a_model_of_integers_alone() -> None:
    assert error_of(lambda: qpass.prepare(Integers(), (torch.arange(4),)), CaptureError) == (
        "Integers computes with integers alone, so there is nothing to quantize\n"
        "  where: Integers\n"
        "  to do: pass the float model; a quantized one is not quantized again"
    )


@pytest.mark.parametrize("example_inputs", [None, (X,)], ids=["first batch", "inputs"])
def test_a_model_on_the_meta_device(example_inputs: Any) -> None:
    assert error_of(lambda: qpass.prepare(two().to("meta"), example_inputs), CaptureError) == (
        "the model is on the meta device: 4 of its tensors hold no data\n"
        "  where: first.weight\n"
        "  to do: load the weights first, for example model.to_empty(device='cpu') and load_state_dict"
    )


@pytest.mark.parametrize(("model", "kind"), [(torch.relu, "builtin_function_or_method"), (None, "NoneType")])
def test_prepare_is_given_no_model(model: Any, kind: str) -> None:
    assert error_of(lambda: qpass.prepare(model, (X,)), InputError) == (
        f"prepare takes an nn.Module, an ExportedProgram or a GraphModule, not {kind}\n  to do: pass the model itself"
    )


def test_prepare_is_given_inputs_of_another_kind() -> None:
    assert error_of(lambda: qpass.prepare(two(), "x"), InputError) == (  # type: ignore[arg-type]
        "example_inputs is a tuple of positional inputs, one tensor or a dict, not str\n"
        "  to do: pass example_inputs=(x,); x is one batch, as next(iter(loader)) gives it"
    )
    assert error_of(lambda: qpass.prepare(two(), (X, X)), CaptureError) == (
        "torch.export cannot capture Two: too many positional arguments\n"
        "  where: Two\n"
        "  to do: pass example_inputs (and kwargs) just as the model's forward takes them"
    )


def test_prepare_is_given_a_prepared_or_quantized_model() -> None:
    again = "  to do: start again from the float model"
    for model in (prepared(), qpass.prepare(two())):
        assert error_of(lambda model=model: prepared(model), InputError) == f"the model is prepared already\n{again}"
    assert error_of(lambda: prepared(quantized()), InputError) == f"the model is quantized already\n{again}"


def test_a_config_of_another_kind() -> None:
    assert error_of(lambda: prepared(config=8), InputError) == (
        "A config is a Config or the name of a preset, not int\n"
        "  to do: pass one of int8_static, int8_dynamic, int8_weight_only, int8_qat, or build a qpass.Config"
    )


# pickle


@pytest.mark.parametrize("make", [prepared, quantized])
def test_a_graph_is_pickled(make: Callable[[], Any]) -> None:
    assert error_of(lambda: pickle.dumps(make()), InputError) == (
        "Two is a graph of qpass, and pickle would lose what was decided about it\n"
        "  to do: write a quantized one with qpass.save; of a prepared one keep the state_dict(), and load it into the "
        "result of the same call of qpass.prepare"
    )


# calibrate


def test_calibrate_is_given_a_float_model() -> None:
    assert error_of(lambda: qpass.calibrate(two(), [X]), InputError) == (
        "calibrate takes a prepared model, and this Two observes nothing\n"
        "  to do: call qpass.prepare on the model first"
    )


@pytest.mark.parametrize(("batch", "kind"), [(X, "Tensor"), ({"x": X}, "dict")])
def test_calibrate_is_given_one_batch(batch: Any, kind: str) -> None:
    assert error_of(lambda: qpass.calibrate(prepared(), batch), InputError) == (
        f"calibrate takes an iterable of batches, and this is one {kind}\n  to do: pass a list of batches: [batch]"
    )


def test_calibrate_is_given_labels_too() -> None:
    for model in (prepared(), calibrated_at_first_batch()):
        assert error_of(lambda model=model: qpass.calibrate(model, [(X, torch.zeros(3))]), InputError) == (
            "a batch of calibrate does not fit the model's arguments: too many positional arguments\n"
            "  to do: a batch is what the model was captured with, without labels: "
            "calibrate(prepared, (inputs for inputs, labels in loader))"
        )


def calibrated_at_first_batch() -> nn.Module:
    return qpass.calibrate(qpass.prepare(two()), [X])


def test_keyword_arguments_come_in_any_mapping() -> None:
    model = prepared()
    qpass.calibrate(model, [UserDict(x=X)])
    qpass.convert(model)


# convert


def test_observers_saw_no_data() -> None:
    line = "test_api_errors.py: return self.second(torch.relu(self.first(x)))"
    assert error_of(lambda: qpass.convert(prepared()), CalibrationError) == (
        "2 observers saw no data\n"
        f"  where: first (linear), {line}\n"
        f"         second (linear_1), {line}\n"
        "  to do: run the prepared model on representative batches (qpass.calibrate) that reach these places, or leave "
        "them in float with config.keep_float(module=...)"
    )


def test_observers_saw_nothing_finite() -> None:
    line = "test_api_errors.py: return self.second(torch.relu(self.first(x)))"
    model = prepared()
    qpass.calibrate(model, [X * float("nan")])
    assert error_of(lambda: qpass.convert(model), CalibrationError).startswith(
        "2 observers saw no finite data\n"
        f"  where: first (linear), {line}: NaN and infinities alone\n"
        f"         second (linear_1), {line}: NaN and infinities alone\n"
    )


def test_convert_is_called_before_the_first_batch() -> None:
    assert error_of(lambda: qpass.convert(qpass.prepare(two())), CaptureError) == (
        "the model was given without example inputs and has not seen a batch yet, so there is no graph\n"
        "  where: Two\n"
        "  to do: call it on a batch first, or pass example_inputs"
    )


def test_convert_is_called_on_its_own_result() -> None:
    assert error_of(lambda: qpass.convert(quantized()), ConvertError) == (
        "convert takes a prepared model, and this graph is quantized\n"
        "  to do: it is converted already: compile it with torch.compile(model, backend='qpass')"
    )
    assert error_of(lambda: qpass.convert(qpass.lower(quantized())), ConvertError) == (
        "convert takes a prepared model, and this graph is lowered\n  to do: it is converted and lowered already"
    )


def test_convert_is_called_on_a_float_model() -> None:
    prepare_first = "  to do: call qpass.prepare on the model first, calibrate, then convert"
    assert error_of(lambda: qpass.convert(two()), ConvertError) == (
        f"convert takes a prepared model, and this is a float Two\n{prepare_first}"
    )
    exported = torch.export.export(two(), (X,)).module()
    assert error_of(lambda: qpass.convert(exported), ConvertError) == (
        f"convert takes a prepared model, and this graph is captured\n{prepare_first}"
    )


def test_convert_strictly() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 4)).eval()
    with_conv = qpass.prepare(model, (torch.randn(2, 1, 4, 4),), config="int8_dynamic")
    assert error_of(lambda: qpass.convert(with_conv, strict=True), StrictError) == (
        "1 operations were left in float\n"
        "  where: 0 (conv2d): qconv takes one static activation scale per tensor\n"
        "  to do: name them in config.keep_float(...) to accept that, or convert without strict=True"
    )


# lower


def test_lower_is_called_on_something_else() -> None:
    assert error_of(lambda: qpass.lower(two()), InputError) == (  # type: ignore[arg-type]
        "lower takes the result of convert, not Two\n  to do: call qpass.convert first"
    )
    assert error_of(lambda: qpass.lower(prepared()), LowerError) == (
        "lower takes a quantized graph, and this one is prepared\n  to do: call qpass.convert first"
    )
