from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpret import operators
from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, WEIGHT_ONLY, Do, decisions, kernel_names, reason, run_stages
from qpass.spec import PerChannel, PerTensor, QuantizationSpec
from qpass.spec.config import Config

CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INT8_WEIGHT = QuantizationSpec(torch.int8, PerChannel(0))


def image(channels: int = 4, rank: int = 2) -> Tensor:
    return torch.randn(2, channels, *(8,) * rank)


def settled(norm: Any) -> Any:
    """A batch norm as training leaves it: every statistic away from where it started."""
    for tensor, low in ((norm.weight, 0.5), (norm.bias, -1), (norm.running_mean, -1), (norm.running_var, 0.5)):
        nn.init.uniform_(tensor, low, low + 1.5)
    return norm


def test_batch_norm_and_activation_run_in_the_kernel() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), settled(nn.BatchNorm2d(4)), nn.ReLU(), nn.Conv2d(4, 4, 3))
    r = run_stages(model, image(3))
    assert (
        operators(r.prepared)
        == """\
observer_1 = observer_1(0.weight)
observer_3 = observer_3(3.weight)
input_1 = input
observer_0 = observer_0(input_1)
conv2d = conv2d(observer_0, observer_1, 0.bias)
batch_norm = batch_norm(conv2d, 1.weight, 1.bias, 1.running_mean, 1.running_var, False, 0.1, 1e-05, False)
relu = relu(batch_norm)
observer_2 = observer_2(relu)
conv2d_1 = conv2d(observer_2, observer_3, 3.bias)
return [conv2d_1]"""
    )
    assert (
        operators(r.quantized)
        == """\
dequantize_per_channel = dequantize_per_channel(codes(3.weight), 0, -127, 127, int8)
input_1 = input
quantize_per_tensor = quantize_per_tensor(input_1, s, z, 0, 255, uint8)
dequantize_per_tensor = dequantize_per_tensor(quantize_per_tensor, s, z, 0, 255, uint8)
dequantize_per_channel_1 = dequantize_per_channel(codes(0.weight), 0, -127, 127, int8)
conv2d = conv2d(dequantize_per_tensor, dequantize_per_channel_1, 0.folded, [1, 1], [0, 0], [1, 1], 1)
relu = relu(conv2d)
quantize_per_tensor_1 = quantize_per_tensor(relu, s, z, 0, 255, uint8)
dequantize_per_tensor_1 = dequantize_per_tensor(quantize_per_tensor_1, s, z, 0, 255, uint8)
conv2d_1 = conv2d(dequantize_per_tensor_1, dequantize_per_channel, 3.bias)
return [conv2d_1]"""
    )
    geometry = "[1, 1], [0, 0], [1, 1], 1"
    first = f"quantize_per_tensor, s, z, packed(0.weight), 0.folded, {geometry}, s, z, uint8, relu, [], "
    second = f"qconv_pointwise, s, z, packed(3.weight), 3.bias, {geometry}, 1, 0, float32, none, [], none"
    assert (
        operators(r.lowered)
        == f"""\
input_1 = input
quantize_per_tensor = quantize_per_tensor(input_1, s, z, 0, 255, uint8)
qconv_pointwise = onednn.qconv_pointwise({first})
qconv_pointwise_1 = onednn.qconv_pointwise({second})
clone = clone(qconv_pointwise_1, memory_format=torch.contiguous_format)
return [clone]"""
    )
    assert [kernel.differing for kernel in r.kernels[:1]] == [0]


def test_one_dimension_is_an_image_of_one_row() -> None:
    r = run_stages(nn.Conv1d(3, 4, 3, stride=2, padding=1), image(3, rank=1))
    kernel = "unsqueeze, s, z, packed(weight), bias, [1, 2], [0, 1], [1, 1], 1, 1, 0, float32, none, [], none"
    assert (
        operators(r.lowered)
        == f"""\
input_1 = input
quantize_per_tensor = quantize_per_tensor(input_1, s, z, 0, 255, uint8)
unsqueeze = unsqueeze(quantize_per_tensor, 2)
qconv_pointwise = onednn.qconv_pointwise({kernel})
squeeze_dim = squeeze.dim(qconv_pointwise, 2)
clone = clone(squeeze_dim, memory_format=torch.contiguous_format)
return [clone]"""
    )


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "silu"])
def test_batch_norm_then_activation_then_depthwise(rank: int, activation: str) -> None:
    act = getattr(F, activation)
    model = Do(
        lambda m, x: m.c(act(m.b(act(m.norm(m.a(x)))))),
        a=CONV[rank](4, 6, 3, padding=1, bias=False), norm=settled(NORM[rank](6)),
        b=CONV[rank](6, 6, 3, groups=6, stride=2, padding=1), c=CONV[rank](6, 4, 3, groups=2, dilation=2, padding=2),
    )  # fmt: skip
    r = run_stages(model, image(rank=rank))
    behind = "" if rank == 3 else f" with {activation}, quantize"
    assert kernel_names(r.lowered) == [f"onednn.qconv{behind}", f"onednn.qconv{behind}", "onednn.qconv"]
    assert len(r.kernels) == 3


def test_an_activation_that_no_convolution_fuses_stays_behind() -> None:
    r = run_stages(nn.Sequential(nn.Conv2d(4, 4, 3), nn.GELU(), nn.Conv2d(4, 4, 3)), image())
    assert kernel_names(r.lowered) == ["onednn.qconv", "onednn.qconv"]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_shortcut_is_added_by_the_kernel(rank: int, relu: bool) -> None:
    def block(m: Any, x: Tensor) -> Tensor:
        y = m.b(x) + m.a(x)
        return m.c(torch.relu(y) if relu else y)

    conv = CONV[rank]
    model = Do(block, a=conv(4, 4, 3, padding=1), b=conv(4, 4, 3, padding=1), c=conv(4, 4, 3))
    r = run_stages(model, image(rank=rank))
    fused = "add, relu" if relu else "add"
    names = ["onednn.qconv with quantize", f"onednn.qconv (add) with {fused}, quantize", "onednn.qconv"]
    assert kernel_names(r.lowered) == names
    assert [kernel.differing for kernel in r.kernels[:2]] == [0, 0]


def test_a_shortcut_that_is_read_again_is_copied_before_the_kernel_writes_to_it() -> None:
    model = Do(lambda m, x: (m.c(m.b(y := m.a(x)) + y), m.d(y)), b=nn.Conv2d(4, 4, 3, padding=1),
               a=nn.Conv2d(4, 4, 3), c=nn.Conv2d(4, 4, 3), d=nn.Conv2d(4, 4, 3))  # fmt: skip
    r = run_stages(model, image())  # fails where a node reads what another has written to
    assert "onednn.qconv (add) with add, quantize" in kernel_names(r.lowered)
    assert "clone(qconv_pointwise" in operators(r.lowered)


def test_a_shortcut_that_nothing_reads_later_is_not_copied() -> None:
    model = Do(lambda m, x: m.c(m.b(x) + m.a(x)),
               a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), c=nn.Conv2d(4, 4, 3))  # fmt: skip
    text = operators(run_stages(model, image()).lowered)
    assert text.count("clone(") == 1
    assert text.splitlines()[-1] == "return [clone]"  # what leaves the model has the layout of the float model


def test_a_sum_that_is_not_rounded_is_added_in_float() -> None:
    """The kernel that adds writes codes; before the end of a model nothing asks for them."""
    model = Do(lambda m, x: m.b(x) + m.a(x), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3))
    r = run_stages(model, image())
    assert kernel_names(r.lowered) == ["onednn.qconv", "onednn.qconv with quantize"]
    assert operators(r.lowered).splitlines()[-3].startswith("add = add.Tensor(")


@pytest.mark.parametrize("name", ["batch norm twice", "two readers", "batch norm after relu"])
def test_batch_norms_that_do_not_fold(name: str) -> None:
    models: dict[str, nn.Module] = {
        "batch norm twice": nn.Sequential(nn.Conv2d(4, 4, 3), settled(nn.BatchNorm2d(4)), settled(nn.BatchNorm2d(4))),
        "two readers": Do(lambda m, x: (m.n(y := m.a(x)), y), a=nn.Conv2d(4, 4, 3), n=settled(nn.BatchNorm2d(4))),
        "batch norm after relu": nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), settled(nn.BatchNorm2d(4))),
    }
    r = run_stages(models[name], image())
    assert "batch_norm(" in operators(r.lowered)
    op = "batch_norm 1" if name == "batch norm twice" else "batch_norm"
    expected = "a batch norm that does not directly follow a quantized convolution is not folded"
    assert decisions(models[name], image())[op].reason == expected


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_name(rank: int, padding: str) -> None:
    model = nn.Sequential(CONV[rank](4, 4, 3, padding=padding, dilation=2), settled(NORM[rank](4)))
    r = run_stages(model, image(rank=rank))
    assert kernel_names(r.lowered) == ["onednn.qconv"]
    assert len(r.kernels) == 1


@pytest.mark.parametrize(
    "activation",
    [QuantizationSpec(torch.int8, PerTensor(), symmetric=False), QuantizationSpec(torch.int8, PerTensor())],
    ids=["affine", "symmetric"],
)
def test_signed_codes(activation: QuantizationSpec) -> None:
    """int8 activations are shifted to uint8; the kernel that adds takes uint8 alone, and the addition stays outside."""
    model = Do(lambda m, x: m.c(m.b(x) + m.a(x)), a=nn.Conv2d(4, 4, 3), b=nn.Conv2d(4, 4, 3), c=nn.Conv2d(4, 4, 3))
    r = run_stages(model, image(), config=Config(activation=activation, weight=INT8_WEIGHT))
    kernels = [name.partition(" with")[0] for name in kernel_names(r.lowered)]
    assert kernels == ["onednn.qconv", "onednn.qconv", "fused loop", "onednn.qconv"]
    assert "bitwise_xor" in operators(r.lowered)


def test_channels_last_images() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last)
    r = run_stages(model, image().to(memory_format=torch.channels_last))
    assert kernel_names(r.lowered) == ["onednn.qconv with relu, quantize", "onednn.qconv"]


def conv2d(**options: Any) -> nn.Module:
    return nn.Conv2d(4, 4, 3, **options)


NEAR_MISSES: dict[str, tuple[nn.Module, tuple[int, ...], Config, str]] = {
    "unbatched": (conv2d(), (4, 8, 8), STATIC, "qconv takes batched input"),
    "computed weight": (
        Do(lambda m, x: F.conv2d(x, x[:, :, :3, :3])), (4, 4, 8, 8), STATIC, "the weight is computed, not stored",
    ),
    "computed bias": (
        Do(lambda m, x: F.conv2d(x, m.w, x[0, :, 0, 0]), w=nn.Parameter(torch.ones(4, 4, 3, 3))), (2, 4, 8, 8), STATIC,
        "the bias is computed, not stored",
    ),
    "per tensor": (
        conv2d(), (2, 4, 8, 8), Config(STATIC.activation, QuantizationSpec(torch.int8, PerTensor())),
        "the kernel takes one weight scale per output channel (axis 0)",
    ),
    "dynamic": (conv2d(), (2, 4, 8, 8), PER_TENSOR, "qconv takes one static activation scale per tensor"),
    "per token": (conv2d(), (2, 4, 8, 8), PER_TOKEN, "qconv takes one static activation scale per tensor"),
    "weight only": (conv2d(), (2, 4, 8, 8), WEIGHT_ONLY, "the activation is not quantized"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    model, shape, config, expected = NEAR_MISSES[name]
    assert reason(model, torch.randn(shape), config=config, op="conv2d") == expected


def test_padding_that_is_wider_on_one_side_is_declined() -> None:
    expected = "padding='same' pads one side of an even kernel more than the other"
    assert reason(nn.Conv2d(4, 4, 4, padding="same"), image(), op="conv2d.padding") == expected


def test_transposed_convolutions_are_another_operation() -> None:
    model = nn.ConvTranspose2d(4, 4, 3)
    assert reason(model, image(), op="conv_transpose2d.input") == "the catalogue has no transposed convolution"
