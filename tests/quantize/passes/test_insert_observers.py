from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from interpret import operators
from pass_run import run_once
from pipeline_run import PER_TENSOR, STATIC, Do
from qpass.capture.export import capture
from qpass.observer import HistogramObserver, PerChannelMinMaxObserver
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.insert_observers import InsertObservers, observers
from qpass.spec import PerTensor, QuantizationSpec
from qpass.spec.config import Config
from qpass.targets import X86


def observed(model: nn.Module, *inputs: Tensor, config: Config = STATIC) -> fx.GraphModule:
    gm = capture(model.eval(), inputs)
    Annotate(config, X86).run(gm)
    assert run_once(InsertObservers(), gm, *inputs) == len(list(observers(gm)))
    return gm


def conv(inputs: int = 4) -> nn.Module:
    return nn.Conv2d(inputs, 4, 3)


def test_an_observer_stands_on_every_edge() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    gm = capture(model, (x,))
    Annotate(STATIC, X86).run(gm)
    assert (
        operators(gm)
        == """\
input_1 = input
linear = linear(input_1, weight, bias)
return [linear]"""
    )
    assert run_once(InsertObservers(), gm, x) == 2
    assert (
        operators(gm)
        == """\
observer_1 = observer_1(weight)
input_1 = input
observer_0 = observer_0(input_1)
linear = linear(observer_0, observer_1, bias)
return [linear]"""
    )
    assert torch.equal(gm(x), model(x))
    kinds = [type(gm.get_submodule(name)) for _, name in observers(gm)]
    assert kinds == [PerChannelMinMaxObserver, HistogramObserver]


def test_one_tensor_has_one_observer_however_many_read_it() -> None:
    model = Do(lambda m, x: m.a(y := m.c(x)) + m.b(y), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
    gm = observed(model, torch.randn(3, 4))
    sources = [str(node.args[0]) for node, _ in observers(gm)]
    assert sources == ["a_weight", "b_weight", "c_weight", "inputs_0", "linear"]


def test_two_specs_on_one_tensor_are_two_observers() -> None:
    narrow = QuantizationSpec(torch.uint8, PerTensor(), symmetric=False, quant_max=127)
    model = Do(lambda m, x: m.a(x) + m.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    gm = observed(model, torch.randn(3, 4), config=STATIC.override(module="b", activation=narrow))
    specs = [gm.get_submodule(name).spec for node, name in observers(gm) if str(node.args[0]) == "inputs_0"]
    assert {spec.quant_max for spec in specs} == {127, 255}


def test_the_observer_stands_in_front_of_what_moves_values() -> None:
    model = Do(lambda m, x: m.b(torch.max_pool2d(m.a(x), 2).flatten(1)), a=conv(), b=nn.Linear(36, 4))
    assert operators(observed(model, torch.randn(2, 4, 8, 8))).splitlines()[4:] == [
        "conv2d = conv2d(observer_0, observer_1, a.bias)",
        "observer_2 = observer_2(conv2d)",
        "max_pool2d = max_pool2d(observer_2, [2, 2])",
        "flatten = flatten.using_ints(max_pool2d, 1)",
        "linear = linear(flatten, observer_3, b.bias)",
        "return [linear]",
    ]


def test_but_not_where_somebody_reads_the_view_in_float() -> None:
    model = Do(lambda m, x: (m.b(y := torch.sin(x).flatten(1)), torch.cos(y)), b=nn.Linear(4, 4))
    text = operators(observed(model, torch.randn(3, 2, 2)))
    assert "observer_0 = observer_0(flatten)" in text
    assert "cos = cos(flatten)" in text


def test_a_dynamic_range_belongs_to_the_tensor_that_is_multiplied() -> None:
    model = Do(lambda m, x: m.b(torch.sin(x).flatten(1)), b=nn.Linear(4, 4))
    assert "observer_0 = observer_0(flatten)" in operators(observed(model, torch.randn(3, 2, 2), config=PER_TENSOR))


def test_the_inputs_of_a_concatenation_share_one_observer() -> None:
    def joined(m: Any, x: Tensor) -> Tensor:
        return m.c(torch.cat([m.a(x), m.b(x)], 1))

    gm = observed(Do(joined, a=conv(), b=conv(), c=conv(8)), torch.randn(2, 4, 9, 9))
    names = {str(node.args[0]): name for node, name in observers(gm)}
    assert names["conv2d"] == names["conv2d_1"]
    assert names["inputs_0"] != names["conv2d"]
    calls = [node.name for node, name in observers(gm) if name == names["conv2d"]]
    assert f"cat = cat([{', '.join(calls)}], 1)".replace("activation_post_process", "observer") in operators(gm)


def test_a_constant_is_observed_where_it_stands() -> None:
    gm = observed(nn.Linear(4, 4), torch.randn(3, 4))
    node, _ = next(observers(gm))
    assert node.args[0].target == "weight"
    assert node.args[0].next is node
    assert node.meta["from_node"][0].name == "linear"  # a parameter has no line of its own; its reader has
