"""What training changes goes out before it is decided what to quantize, comes back after, and goes out for convert."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from interpret import operators
from pass_run import run_once
from pipeline_run import STATIC, Do
from qpass.capture.training import capture_training
from qpass.presets import int8_qat
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.insert_modes import InsertModes
from qpass.quantize.passes.insert_observers import InsertObservers
from qpass.quantize.passes.remove_modes import RemoveModes
from qpass.quantize.passes.set_dropout_aside import SetDropoutAside
from qpass.spec.config import Config
from qpass.targets import X86

QAT = int8_qat(compute_dtype=None)


def with_observers(model: nn.Module, x: Tensor, config: Config = QAT) -> fx.GraphModule:
    gm = capture_training(model, (x,))
    run_once(SetDropoutAside(), gm, x)
    Annotate(config, X86).run(gm)
    InsertObservers().run(gm)
    gm.recompile()
    return gm


def test_a_convolution_is_trained_as_it_will_run_and_restored_for_convert() -> None:
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).train(),
        torch.randn(2, 3, 6, 6),
    )
    gm = with_observers(model, x)
    before = operators(gm)
    assert (
        before
        == """\
observer_1 = observer_1(0.weight)
input_1 = input
observer_0 = observer_0(input_1)
conv2d = conv2d(observer_0, observer_1)
batch_norm = batch_norm(conv2d, 1.weight, 1.bias, 1.running_mean, 1.running_var, False, 0.1, 1e-05, False)
relu = relu(batch_norm)
return [relu]"""
    )
    assert run_once(InsertModes(), gm, x) == 1
    assert (
        operators(gm)
        == """\
input_1 = input
observer_0 = observer_0(input_1)
fold_factor_0 = fold_factor_0(1.weight, 1.running_var, observer_1.fake_quant_enabled)
folded_bias_0 = folded_bias_0(None, fold_factor_0, 1.bias, 1.running_mean, observer_1.fake_quant_enabled)
folded_weight_0 = folded_weight_0(0.weight, fold_factor_0)
observer_1 = observer_1(folded_weight_0)
conv2d = conv2d(observer_0, observer_1, folded_bias_0, [1, 1], [0, 0], [1, 1], 1)
_1 = 1(conv2d, 1.weight, 1.bias, 1.running_mean, 1.running_var, 1.num_batches_tracked, \
fold_factor_0, observer_1.fake_quant_enabled)
relu = relu(_1)
return [relu]"""
    )
    assert run_once(RemoveModes(), gm, x) == 4
    assert (
        operators(gm)
        == """\
input_1 = input
observer_0 = observer_0(input_1)
observer_1 = observer_1(0.weight)
conv2d = conv2d(observer_0, observer_1, None, [1, 1], [0, 0], [1, 1], 1)
batch_norm = batch_norm(conv2d, 1.weight, 1.bias, 1.running_mean, 1.running_var, False, 0.1, 1e-05, False)
relu = relu(batch_norm)
return [relu]"""
    )


def test_dropout_hides_no_fusion_and_stands_behind_the_rounding() -> None:
    model = Do(
        lambda m, x: m.fc2(m.drop(torch.relu(m.fc1(x)))) + x,
        fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4), drop=nn.Dropout(0.5),
    ).train()  # fmt: skip
    x = torch.randn(3, 4)
    gm = with_observers(model, x)
    assert "dropout" not in operators(gm)
    run_once(InsertModes(), gm, x)
    assert operators(gm).splitlines()[4:] == [
        "linear = linear(observer_0, observer_1, fc1.bias)",
        "relu = relu(linear)",
        "observer_2 = observer_2(relu)",
        "drop = drop(observer_2)",
        "linear_1 = linear(drop, observer_3, fc2.bias)",
        "add = add.Tensor(linear_1, inputs_0)",
        "return [add]",
    ]
    run_once(RemoveModes(), gm, x)
    assert "linear_1 = linear(observer_2, observer_3, fc2.bias)" in operators(gm)


def test_readers_that_are_rounded_differently_see_the_same_dropped_elements() -> None:
    model = Do(lambda m, x: (y := m.drop(x), m.fc(y), y * 2)[1:], fc=nn.Linear(4, 4), drop=nn.Dropout(0.5)).train()
    x = torch.randn(3, 4)
    gm = with_observers(model, x)
    run_once(InsertModes(), gm, x)
    assert operators(gm).splitlines()[2:6] == [
        "drop = drop(inputs_0)",
        "observer_2 = observer_0(drop)",
        "linear = linear(observer_2, observer_1, fc.bias)",
        "mul = mul.Tensor(drop, 2)",
    ]


def test_chains_keep_their_order_and_a_reader_of_both_sides_keeps_its_dropout() -> None:
    model = Do(
        lambda m, x: m.fc(m.drop2(m.drop1(x))) + m.drop3(x) + x,
        fc=nn.Linear(4, 4), drop1=nn.Dropout(0.1), drop2=nn.Dropout(0.2), drop3=nn.Dropout(0.3),
    ).train()  # fmt: skip
    x = torch.randn(3, 4)
    gm = with_observers(model, x)
    run_once(InsertModes(), gm, x)
    drops = [(node.args[0].name, gm.get_submodule(node.target).p) for node in gm.graph.find_nodes(
        op="call_module", sort=True) if node.target.startswith("drop")]  # fmt: skip
    assert [p for _, p in drops] == [0.1, 0.2, 0.3]
    torch.manual_seed(0)
    for module in gm.modules():
        if hasattr(module, "fake_quant_enabled"):
            module.fake_quant_enabled[0] = 0
    y = gm.train()(x)
    torch.manual_seed(0)
    assert torch.equal(y, model(x))


def test_a_shared_weight_has_an_observer_for_each_norm() -> None:
    model = Do(
        lambda m, x: m.norm1(m.conv(x)) + m.norm2(m.conv(x)),
        conv=nn.Conv2d(3, 4, 3), norm1=nn.BatchNorm2d(4), norm2=nn.BatchNorm2d(4),
    ).train()  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    gm = with_observers(model, x)
    run_once(InsertModes(), gm, x)
    weights = gm.graph.find_nodes(op="call_module", target="folded_weight_0")
    weights += gm.graph.find_nodes(op="call_module", target="folded_weight_1")
    (first,), (second,) = (node.users for node in weights)
    assert first.target != second.target
    assert gm.get_submodule(first.target).spec == gm.get_submodule(second.target).spec


def test_without_fake_quantize_a_norm_is_trained_as_it_is() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train(), torch.randn(2, 3, 6, 6)
    gm = with_observers(model, x, STATIC)
    run_once(InsertModes(), gm, x)
    assert operators(gm).splitlines()[-2].startswith("_1 = 1(conv2d, 1.weight, 1.bias,")
    assert "folded" not in operators(gm)


def test_a_model_that_training_does_not_change_is_left_alone() -> None:
    x = torch.randn(3, 4)
    gm = with_observers(nn.Linear(4, 4).train(), x)
    text = operators(gm)
    assert [step.run(gm).changed for step in (SetDropoutAside(), InsertModes(), RemoveModes())] == [0, 0, 0]
    assert operators(gm) == text
