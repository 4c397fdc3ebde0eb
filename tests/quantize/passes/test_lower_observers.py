from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from interpret import operators
from pass_run import run_once
from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, Do
from qpass.capture.export import capture
from qpass.errors import CalibrationError
from qpass.ir.origins import derived_constants
from qpass.observer import MinMaxObserver
from qpass.presets import int8_weight_only
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.insert_observers import InsertObservers
from qpass.quantize.passes.lower_observers import LowerObservers, quantized_parts
from qpass.spec import PerChannel, PerGroup, PerTensor, QuantizationSpec
from qpass.spec.config import Config
from qpass.targets import X86


def prepared(model: nn.Module, *inputs: Tensor, config: Config = STATIC) -> fx.GraphModule:
    gm = capture(model.eval(), inputs)
    Annotate(config, X86).run(gm)
    InsertObservers().run(gm)
    gm.recompile()
    with torch.no_grad():
        gm(*inputs)
    return gm


def test_static_parameters_are_numbers_in_the_graph() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.0, 4.1], [0.0, 0.5, 3.0, 2.0]])
    activation = QuantizationSpec(torch.uint8, PerTensor(), symmetric=False, observer=MinMaxObserver)
    gm = prepared(nn.Linear(4, 4), x, config=Config(activation, STATIC.weight))
    assert (
        operators(gm)
        == """\
observer_1 = observer_1(weight)
input_1 = input
observer_0 = observer_0(input_1)
linear = linear(observer_0, observer_1, bias)
return [linear]"""
    )
    assert run_once(LowerObservers(), gm, x) == 2
    assert (
        operators(gm)
        == """\
dequantize_per_channel = dequantize_per_channel(codes(weight), 0, -127, 127, int8)
input_1 = input
quantize_per_tensor = quantize_per_tensor(input_1, 0.02, 50, 0, 255, uint8)
dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, 0.02, 50, 0, 255, uint8)
linear = linear(dequantize_per_tensor, dequantize_per_channel, bias)
return [linear]"""
    )  # 0.02 = (4.1 - -1) / 255, and -1 has the code 0
    assert [name for name, _ in gm.named_children() if name.startswith("activation_post_process")] == []


@pytest.mark.parametrize(
    ("config", "lines"),
    [
        (PER_TENSOR, [
            "choose_qparams_tensor = choose_qparams.tensor(input_1, 0, 255, 1.19209e-07, uint8)",
            "getitem = getitem(choose_qparams_tensor, 0)",
            "getitem_1 = getitem(choose_qparams_tensor, 1)",
            "quantize_per_tensor_tensor = quantize_per_tensor.tensor(input_1, getitem, getitem_1, 0, 255, uint8)",
        ]),
        (PER_TOKEN, [
            "choose_qparams_per_token = choose_qparams_per_token(input_1, int8)",
            "getitem = getitem(choose_qparams_per_token, 0)",
            "getitem_1 = getitem(choose_qparams_per_token, 1)",
            "quantize_per_token = quantize_per_token(input_1, getitem, getitem_1, -127, 127, int8)",
        ]),
    ],
    ids=["tensor", "token"],
)  # fmt: skip
def test_dynamic_parameters_are_computed_in_the_graph(config: Config, lines: list[str]) -> None:
    x = torch.randn(3, 4)
    gm = prepared(nn.Linear(4, 4), x, config=config)
    assert run_once(LowerObservers(), gm, x) == 2  # the vals of choose_qparams are those that it really returns
    assert operators(gm).splitlines()[2:6] == lines


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_dynamic_range_serves_two_linears(symmetric: bool) -> None:
    """A fault of the nearest relative: a symmetric dynamic range that feeds two linears crashes."""
    dtype = torch.int8 if symmetric else torch.uint8
    activation = QuantizationSpec(dtype, PerTensor(), symmetric=symmetric, dynamic=True)
    model, x = Do(lambda m, x: m.a(x) - m.b(x), a=nn.Linear(4, 4), b=nn.Linear(4, 4)).eval(), torch.randn(3, 4)
    gm = prepared(model, x, config=Config(activation, STATIC.weight))
    run_once(LowerObservers(), gm, x)
    assert operators(gm).count("= choose_qparams") == 1
    expected = model(x)
    assert (gm(x) - expected).norm() < 0.05 * expected.norm()  # 8 bits; without the shared range it would not run


def test_a_view_of_a_parameter_is_a_weight_too() -> None:
    x = torch.randn(3, 4)
    gm = prepared(Do(lambda m, x: x @ m.w.t(), w=nn.Parameter(torch.randn(5, 4))), x)
    run_once(LowerObservers(), gm, x)
    assert gm.w_codes.shape == (4, 5)
    derived = derived_constants(gm)
    assert list(derived) == ["w_codes", "w_scale", "w_zero_point"]
    other = torch.randn(5, 4)  # what a weight of other values would be coded as
    spec = QuantizationSpec(torch.int8, PerChannel(1))
    for constant, part in zip(derived.values(), quantized_parts(other.t(), spec), strict=True):
        assert constant.sources == ("w",)
        assert torch.equal(constant.compute(other), part)


@pytest.mark.parametrize(
    "spec",
    [
        QuantizationSpec(torch.int8, PerChannel(0)), QuantizationSpec(torch.int8, PerChannel(1)),
        QuantizationSpec(torch.int8, PerGroup(4)), QuantizationSpec(torch.int8, PerTensor()),
        QuantizationSpec(torch.uint8, PerChannel(0), symmetric=False),
        QuantizationSpec(torch.int8, PerGroup(2), quant_min=-7, quant_max=7),
    ],
)  # fmt: skip
def test_codes_lie_within_half_a_step_of_the_weight(spec: QuantizationSpec) -> None:
    w = torch.randn(6, 8)
    codes, scale, zero_point = quantized_parts(w, spec)
    assert codes.dtype == spec.dtype
    assert spec.range[0] <= int(codes.min()) <= int(codes.max()) <= spec.range[1]
    if isinstance(spec.granularity, PerGroup):
        w, codes = (t.reshape(-1, spec.granularity.group_size) for t in (w, codes))
        scale, zero_point = scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    elif spec.granularity == PerChannel(0):
        scale, zero_point = scale[:, None], zero_point[:, None]
    # Half a step, and another half where a zero point was rounded; 1e-3 for float32 arithmetic on 255 steps.
    steps = 0.5 if spec.symmetric else 1.0
    assert ((codes.float() - zero_point) * scale - w).abs().div(scale).max() <= steps + 1e-3


def test_an_observer_that_saw_nothing_is_an_error_with_its_place() -> None:
    model = Do(lambda m, x: m.a(x), a=nn.Linear(4, 4)).eval()
    gm = qpass.prepare(model, (torch.randn(3, 4),), config=STATIC)
    with pytest.raises(CalibrationError) as refused:
        qpass.convert(gm)
    assert refused.value.what == "1 observers saw no data"
    assert refused.value.where is not None
    assert refused.value.where.startswith("a (linear), ")
    gm(torch.randn(3, 4))
    qpass.convert(gm)


def test_values_too_small_for_the_smallest_scale_are_noted() -> None:
    model = Do(lambda m, x: m.a(x), a=nn.Linear(4, 4)).eval()
    notes = {}
    for size in (1e-9, 1.0):
        x = torch.linspace(-size, size, 12).reshape(3, 4)
        gm = qpass.prepare(model, (x,), config=STATIC)
        gm(x)
        qpass.convert(gm)
        notes[size] = qpass.report(qpass.convert(gm)).notes
    assert notes[1.0] == ()
    (note,) = notes[1e-9]
    assert note.startswith("a (linear), ")
    assert note.endswith(
        ": values of at most 1.0e-09 are rounded in steps of 1.2e-07, the smallest scale; "
        "give the activation's spec a smaller eps"
    )


def test_weights_and_dynamic_ranges_need_no_data() -> None:
    for config in (PER_TENSOR, PER_TOKEN, int8_weight_only(compute_dtype=None)):
        gm = qpass.prepare(nn.Linear(4, 4).eval(), (torch.randn(3, 4),), config=config)
        assert qpass.convert(gm).weight_codes.dtype == torch.int8
