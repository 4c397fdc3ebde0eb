from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hard_values import ROWS, hard_values
from qpass.arithmetic import kernels
from qpass.arithmetic.choose import choose_qparams, choose_qparams_per_token, choose_qparams_per_token_asymmetric
from qpass.arithmetic.decomposed import OPERATORS, overload
from qpass.arithmetic.decompositions import table
from qpass.errors import InputError
from qpass.ops import graph_ops, quantized_decomposed
from qpass.ops import graph_ops as qd

BOUNDS = [(torch.int8, -128, 127), (torch.uint8, 0, 255), (torch.int8, -8, 7)]
EPS = torch.finfo(torch.float32).eps


def quantizers(x: Tensor, half: Tensor, s: Tensor, z: Tensor, scales: Tensor, zero_points: Tensor) -> list[Tensor]:
    out = []
    columns = scales[:, None], zero_points[:, None]
    groups = columns[0].repeat(1, 4), columns[1].repeat(1, 4)
    for dtype, low, high in BOUNDS:
        bounds = low, high, dtype
        tensor_bounds = torch.tensor(low), torch.tensor(high), dtype
        for values in (x, half):
            out.append(qd.quantize_per_tensor.default(values, 0.0371, 3, *bounds))
            out.append(qd.quantize_per_tensor.tensor(values, s, z, *bounds))
            out.append(qd.quantize_per_tensor.tensor(values, s.double(), z.long(), *bounds))
            out.append(qd.quantize_per_tensor.tensor2(values, s, z, *tensor_bounds))
            out.append(qd.quantize_per_channel.default(values, scales, zero_points, 0, *bounds))
            out.append(qd.quantize_per_channel.default(values, scales, zero_points, 1, *bounds))
            out.append(qd.quantize_per_token.default(values, *columns, *bounds))
            out.append(qd.quantize_per_token.default(values, columns[0].double(), columns[1].long(), *bounds))
        out.append(qd.quantize_per_channel_group.default(x, *groups, *bounds, ROWS // 4))
    return out


def dequantizers(codes: Tensor, s: Tensor, z: Tensor, scales: Tensor, zero_points: Tensor) -> list[Tensor]:
    bounds = (0, 255, torch.uint8)
    tensor_bounds = torch.tensor(0), torch.tensor(255), torch.uint8
    columns = scales[:, None], zero_points[:, None]
    groups = columns[0].repeat(1, 4), columns[1].repeat(1, 4)
    out = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out.append(qd.dequantize_per_tensor.default(codes, 0.0371, 3, *bounds, out_dtype=dtype))
        out.append(qd.dequantize_per_tensor.tensor(codes, s, z, *bounds, out_dtype=dtype))
        out.append(qd.dequantize_per_tensor.tensor2(codes, s.double(), z.long(), *tensor_bounds, out_dtype=dtype))
        out.append(qd.dequantize_per_channel.default(codes, scales, zero_points, 1, *bounds, out_dtype=dtype))
        out.append(qd.dequantize_per_channel.default(codes, scales, None, 0, *bounds, out_dtype=dtype))
        out.append(qd.dequantize_per_token.default(codes, columns[0].double(), columns[1].long(), *bounds, dtype))
        out.append(qd.dequantize_per_channel_group.default(codes, *groups, *bounds, ROWS // 4, dtype))
        out.append(qd.dequantize_per_channel_group.default(codes, groups[0], None, *bounds, ROWS // 4, dtype))
    return out


def dynamic(x: Tensor) -> list[Tensor]:
    out: list[Tensor] = []
    s, z = qd.choose_qparams.tensor(x, 0, 255, EPS, torch.uint8)
    codes = qd.quantize_per_tensor.tensor(x, s, z, 0, 255, torch.uint8)
    out += [s, z, codes, qd.dequantize_per_tensor.tensor(codes, s, z, 0, 255, torch.uint8)]
    s, z = qd.choose_qparams_symmetric.tensor(x, -128, 127, EPS, torch.int8)
    out += [s, z, qd.quantize_per_tensor.tensor(x, s, z, -128, 127, torch.int8)]
    for choose in (qd.choose_qparams_per_token, qd.choose_qparams_per_token_asymmetric):
        s, z = choose(x, torch.int8)
        codes = qd.quantize_per_token(x, s, z, -128, 127, torch.int8)
        out += [s, z, codes, qd.dequantize_per_token(codes, s, z, -128, 127, torch.int8, torch.float32)]
    return out


def arguments(function: Callable[..., list[Tensor]]) -> tuple[Tensor, ...]:
    qparams = (
        torch.tensor([0.0371]),
        torch.tensor([3], dtype=torch.int32),
        torch.rand(ROWS) * 0.05 + 0.001,
        torch.randint(-5, 5, (ROWS,), dtype=torch.int32),
    )
    if function is quantizers:
        return hard_values(0.0371), hard_values(0.0371).bfloat16(), *qparams
    if function is dequantizers:
        return torch.randint(0, 256, (ROWS, ROWS), dtype=torch.uint8), *qparams
    return (torch.randn(ROWS, ROWS) * torch.rand(ROWS, 1) * 4 - 1,)


def inductor(gm: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., object]:
    return compile_fx(gm, inputs, decompositions={**select_decomp_table(), **table()})


def assert_identical(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    assert len(found) == len(expected)
    for place, (f, e) in enumerate(zip(found, expected, strict=True)):
        assert (f.dtype, f.shape) == (e.dtype, e.shape), place
        assert torch.equal(f, e), f"output {place}: {int((f != e).sum())} of {e.numel()} differ"


@pytest.mark.parametrize("function", [quantizers, dequantizers, dynamic])
def test_decomposed_and_compiled_equal_eager(function: Callable[..., list[Tensor]]) -> None:
    """13 million codes of quantizers, half of them at a tie or one float beside it."""
    inputs = arguments(function)
    expected = function(*inputs)
    graph = make_fx(function, decomposition_table=table(), tracing_mode="fake")(*inputs)
    assert not any("quantized_decomposed" in str(node.target) for node in graph.graph.nodes)
    assert_identical(graph(*inputs), expected)
    assert_identical(torch.compile(function, backend=inductor, dynamic=False)(*inputs), expected)


def test_one_symbolic_graph_serves_every_size() -> None:
    graph = make_fx(dynamic, decomposition_table=table(), tracing_mode="symbolic")(torch.randn(6, 10))
    for shape in ((6, 10), (3, 64), (200, 7)):
        x = torch.randn(shape)
        assert_identical(graph(x), dynamic(x))


def test_a_fused_neighbour_does_not_change_codes() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = torch.relu(x)
        codes = qd.quantize_per_tensor(y, 0.0371, 3, 0, 255, torch.uint8)
        values = qd.dequantize_per_tensor(codes, 0.0371, 3, 0, 255, torch.uint8)
        return [codes, values + y, qd.quantize_per_tensor(values * 1.7, 0.051, 0, -127, 127, torch.int8)]

    x = hard_values(0.0371).clamp(-1e6, 1e6)
    assert_identical(torch.compile(function, backend=inductor)(x), function(x))


def test_the_table_has_every_operator_and_is_the_callers_own() -> None:
    namespaces = (graph_ops, quantized_decomposed)
    names = OPERATORS.keys() - {"convert_element_type.no_fuse"}
    assert set(table()) == {overload(name, namespace) for name in names for namespace in namespaces}
    table().clear()
    assert table()


def eager_outcome(call: Callable[[], Tensor]) -> str:
    try:
        return str(call().tolist())
    except Exception as error:
        return type(error).__name__


def test_defects_of_torchs_operators_are_not_inherited() -> None:
    """Each row: (the operator, arguments, what torch answers, what is right)."""
    codes = torch.tensor([[-128, 127]], dtype=torch.int8)
    narrow = torch.tensor([100], dtype=torch.int8)
    one, half = torch.tensor([1.0]), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    i8, i32 = (-128, 127, torch.int8), (-(2**31), 2**31 - 1, torch.int32)
    rows = [
        ("dequantize_per_channel", (codes, one, narrow, 0, *i8), "[[28.0, 27.0]]", "[[-228.0, 27.0]]"),
        ("quantize_per_tensor", (torch.tensor([1e10]), 1.0, 0, *i32), "[-2147483648]", "[2147483647]"),
        (
            "quantize_per_token",  # flat scales are one for each row
            (half, torch.tensor([1.0, 0.5]), torch.zeros(2), *i8),
            "[[1, 4], [3, 8]]",
            "[[1, 2], [6, 8]]",
        ),
        ("quantize_per_channel_group", (half, half, half * 0, *i8, 1), "AssertionError", "[[1, 1], [1, 1]]"),
        ("quantize_per_channel", (half.double(), one.expand(2), narrow.expand(2) * 0, 0, *i8), "AssertionError",
         "[[1, 2], [3, 4]]"),
        ("quantize_per_channel", (half, one, narrow * 0, 0, *i8), "[[1, 2], [3, 4]]", "InputError"),
        ("dequantize_per_token", (codes, torch.ones(3, 1), torch.zeros(3, 1), *i8, torch.float32),
         "[[-128.0, 127.0], [-128.0, 127.0], [-128.0, 127.0]]", "InputError"),
    ]  # fmt: skip
    for name, args, torchs, right in rows:
        assert eager_outcome(lambda name=name, args=args: overload(name)(*args)) == torchs, name
        kernel = OPERATORS[name][1]
        assert eager_outcome(lambda kernel=kernel, args=args: kernel(*args)) == right, name


def test_per_token_qparams_are_what_the_decomposition_says_not_what_torchs_meta_says() -> None:
    x = torch.randn(3, 5, 8)
    meta = qd.choose_qparams_per_token(x.to("meta"), torch.int8)
    graph = make_fx(lambda x: choose_qparams_per_token(x, torch.int8), tracing_mode="fake")(x)
    real = qd.choose_qparams_per_token(x, torch.int8)
    traced = [value.meta["val"].dtype for value in graph.graph.output_node().args[0]]
    assert [t.dtype for t in meta] == [torch.float64, torch.int64]  # torch's, and wrong
    assert traced == [t.dtype for t in real] == [torch.float32, torch.float32]


def test_per_token_qparams_honour_the_dtype() -> None:
    x = torch.tensor([[-1.0, 3.0], [0.5, 2.0]])
    for dtype, low, high in ((torch.uint8, 0, 255), (torch.int16, -(2**15), 2**15 - 1)):
        for choose in (choose_qparams_per_token, choose_qparams_per_token_asymmetric):
            scale, zero_point = choose(x, dtype)
            codes = kernels.quantize_per_token(x, scale, zero_point, low, high, dtype)
            values = kernels.dequantize_per_token(codes, scale, zero_point, low, high, dtype)
            assert ((values - x).abs() <= scale).all()  # half a scale, and half for the zero point


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rows_have_float32_scales(dtype: torch.dtype) -> None:
    x = torch.randn(16, 64).to(dtype)
    for choose in (choose_qparams_per_token, choose_qparams_per_token_asymmetric):
        for found, expected in zip(choose(x, torch.int8), choose(x.float(), torch.int8), strict=True):
            assert torch.equal(found, expected)
    found = choose_qparams(x, 0, 255, EPS, torch.uint8)
    assert torch.equal(found[0], choose_qparams(x.float(), 0, 255, EPS, torch.uint8)[0])


def test_bad_rows_get_finite_qparams() -> None:
    x = torch.tensor([[1.0, torch.nan], [1.0, torch.inf], [-torch.inf, 1.0], [1.0, 2.0]])
    for choose in (choose_qparams_per_token, choose_qparams_per_token_asymmetric):
        scale, zero_point = choose(x, torch.int8)
        clean_scale, clean_zero_point = choose(x[3:], torch.int8)
        assert scale.isfinite().all()
        assert zero_point.isfinite().all()
        assert torch.equal(scale[3:], clean_scale)
        assert torch.equal(zero_point[3:], clean_zero_point)
    assert choose_qparams(x, 0, 255, EPS, torch.uint8)[0].isfinite().all()


def test_groups_of_any_shape() -> None:
    w = torch.randn(2, 3, 8)
    scales = torch.rand(2, 3, 4) + 0.1
    bounds = (-8, 7, torch.int8)
    codes = kernels.quantize_per_channel_group(w, scales, torch.zeros(2, 3, 4), *bounds, 2)
    flat = qd.quantize_per_channel_group(w.reshape(6, 8), scales.reshape(6, 4), torch.zeros(6, 4), *bounds, 2)
    assert torch.equal(codes, flat.reshape(2, 3, 8))
    wide = kernels.quantize_per_channel_group(w[0], scales[0, :, :1], torch.zeros(3, 1), *bounds, 128)
    assert torch.equal(wide, qd.quantize_per_channel_group(w[0], scales[0, :, :1], torch.zeros(3, 1), *bounds, 128))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: kernels.quantize_per_tensor(torch.ones(2), 1.0, 0, -200, 127, torch.int8),
            "A code of -200 does not fit torch.int8, which holds -128..127",
        ),
        (
            lambda: kernels.dequantize_per_tensor(torch.ones(2).byte(), 1.0, 0, 0, 255, torch.int8),
            "Codes are torch.uint8, but the operator says torch.int8",
        ),
        (
            lambda: kernels.quantize_per_channel(torch.ones(2, 2), torch.ones(2), torch.ones(2), 2, 0, 1, torch.int8),
            "axis 2 is out of range for a tensor of 2 dimensions",
        ),
        (
            lambda: kernels.quantize_per_channel_group(torch.ones(2, 6), torch.ones(2, 2), torch.ones(2, 2), 0, 1,
                                                       torch.int8, 4),
            "group_size 4 does not divide the 6 columns of the tensor",
        ),
        (
            lambda: choose_qparams_per_token(torch.ones(2, 2), torch.float16),
            "Codes cannot be stored as torch.float16\n"
            "  to do: use one of torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.float8_e4m3fn, "
            "torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz; fewer bits are carried in int8 or uint8 "
            "by quant_min and quant_max",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message
