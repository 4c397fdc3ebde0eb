from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from interpret import operators
from pass_run import run_once
from pipeline_run import STATIC, Do, kernel_names, records, run_stages
from qpass.capture.export import capture
from qpass.presets import int8_static
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.assign_compute_dtype import AS_IT_COMES, COMPUTE_DTYPE, AssignComputeDtype
from qpass.quantize.passes.cast_compute_dtype import CastComputeDtype
from qpass.targets import X86

BFLOAT16 = int8_static(compute_dtype=torch.bfloat16)
X = torch.linspace(-2, 2, 12).reshape(3, 4)


def assigned(function: Callable[..., Any], *inputs: Tensor, **members: Any) -> fx.GraphModule:
    gm = capture(Do(function, **members).eval(), inputs)
    Annotate(STATIC, X86).run(gm)
    assert run_once(AssignComputeDtype(torch.bfloat16), gm, *inputs) > 0
    return gm


def dtypes(gm: fx.GraphModule) -> dict[str, Any]:
    return {node.name: node.meta[COMPUTE_DTYPE] for node in gm.graph.nodes if COMPUTE_DTYPE in node.meta}


def test_products_and_what_hangs_on_them_are_assigned_the_dtype() -> None:
    gm = assigned(lambda m, x: (torch.tanh(x @ x.t()).cumsum(0).sin(), torch.tanh(x)), X)
    assert dtypes(gm) == {
        "t": AS_IT_COMES, "matmul": torch.bfloat16, "tanh": torch.bfloat16,
        "cumsum": torch.float32, "sin": torch.float32, "tanh_1": torch.float32,
    }  # fmt: skip
    assert records(gm)["matmul"].compute_dtype == torch.bfloat16
    assert records(gm)["cumsum"].compute_dtype is None


def test_a_quantized_operation_computes_in_float32_and_hands_the_dtype_on() -> None:
    gm = assigned(lambda m, x: torch.tanh(m.a(x)), X, a=nn.Linear(4, 4))
    assert dtypes(gm) == {"linear": torch.float32, "tanh": torch.bfloat16}


@pytest.mark.parametrize("offset", [128, -128.0, 1e4])
def test_a_large_number_is_added_in_float32(offset: float) -> None:
    gm = assigned(lambda m, x: (x @ x.t() - offset + x[:, :1]).softmax(-1), X)
    assert dtypes(gm)["sub"] == dtypes(gm)["add"] == dtypes(gm)["softmax"] == torch.float32
    assert dtypes(gm)["matmul"] == torch.bfloat16


def test_a_small_number_is_added_in_the_dtype() -> None:
    gm = assigned(lambda m, x: x @ x.t() - 127.0 + 1e-6, X)
    assert dtypes(gm)["sub"] == dtypes(gm)["add"] == torch.bfloat16


def test_integers_and_masks_have_no_dtype_to_change() -> None:
    gm = assigned(lambda m, x: (x @ x.t()).masked_fill(torch.ones(3, 3, dtype=torch.bool).triu(1), -1.0), X)
    assert set(dtypes(gm)) == {"t", "matmul", "masked_fill"}


def test_casts_stand_where_the_dtype_changes_and_outputs_keep_theirs() -> None:
    gm = assigned(lambda m, x: torch.tanh(x @ x.t()), X)
    before = gm(X)
    assert operators(gm).splitlines()[1:] == [
        "t = t(inputs_0)",
        "matmul = matmul(inputs_0, t)",
        "tanh = tanh(matmul)",
        "return [tanh]",
    ]
    assert run_once(CastComputeDtype(), gm, X) == 3
    assert operators(gm).splitlines()[1:] == [  # a finite number from outside stays finite, an infinity stays infinite
        "clamp = clamp(inputs_0, -3.38953e+38, 3.38953e+38)",
        "isinf = isinf(inputs_0)",
        "where_self = where.self(isinf, inputs_0, clamp)",
        "to_dtype = to.dtype(where_self, bfloat16)",
        "t = t(inputs_0)",
        "clamp_1 = clamp(t, -3.38953e+38, 3.38953e+38)",
        "isinf_1 = isinf(t)",
        "where_self_1 = where.self(isinf_1, t, clamp_1)",
        "to_dtype_1 = to.dtype(where_self_1, bfloat16)",
        "matmul = matmul(to_dtype, to_dtype_1)",
        "tanh = tanh(matmul)",
        "to_dtype_2 = to.dtype(tanh, float32)",
        "return [to_dtype_2]",
    ]
    result = gm(X)
    assert result.dtype == torch.float32
    # bfloat16 keeps 8 bits: two operands and a product up to 16 are rounded, and tanh has slope at most 1.
    torch.testing.assert_close(result, before, atol=3 * 16 * 2**-9, rtol=0)


def test_a_tensor_is_cast_once_for_all_its_readers() -> None:
    stacks = {name: nn.Parameter(torch.randn(2, 4, 4)) for name in "ab"}  # not matrices, so not quantized
    gm = assigned(lambda m, x: x @ m.a + x @ m.b, X, **stacks)
    run_once(CastComputeDtype(), gm, X)
    assert operators(gm).count("clamp(inputs_0, ") == operators(gm).count("isinf(inputs_0)") == 1


def test_a_sparse_constant_stays_as_it_is() -> None:
    model = Do(lambda m, x: m.a(torch.sparse.mm(m.sparse, x)), a=nn.Linear(4, 4), sparse=torch.eye(3).to_sparse())
    prepared = qpass.prepare(model.eval(), (X,), config=BFLOAT16)
    assert torch.equal(prepared(X), model(X))


def test_lists_of_results_are_cast_too() -> None:
    gm = assigned(lambda m, x: torch.add(*(x @ x.t()).split(2)[:1], 1).cumsum(0), X)
    run_once(CastComputeDtype(), gm, X)
    (split,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.split.Tensor)
    assert {value.dtype for value in split.meta["val"]} == {torch.bfloat16}


@pytest.mark.parametrize("readers", ["float and quantized", "float alone"])
def test_a_kernel_writes_bfloat16_once_for_a_float_reader_and_the_rounding(readers: str) -> None:
    def forward(m: Any, x: Tensor, y: Tensor) -> Any:
        z = m.a(x)
        return (z @ y, m.b(z)) if readers == "float and quantized" else z @ y

    model = Do(forward, a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    r = run_stages(model, torch.randn(2, 3, 4), torch.randn(2, 4, 5), config=BFLOAT16)
    assert kernel_names(r.lowered)[0] == "onednn.qlinear with cast to bfloat16"
    if readers == "float and quantized":
        (rounded,) = (n for n in r.quantized.graph.nodes if n.name == "quantize_per_tensor_default_1")
        assert rounded.args[0].meta["val"].dtype == torch.bfloat16


def test_a_concatenation_that_is_rounded_is_not_cast_before() -> None:
    """As behind the skip connections of a U-Net: a cast between the codes and their reader would cost it its kernel."""
    model = Do(lambda m, x, y: m.b(torch.cat([x @ y, m.a(x)], -1)), a=nn.Linear(4, 4), b=nn.Linear(8, 4))
    r = run_stages(model, torch.randn(2, 3, 4), torch.randn(2, 4, 4), config=BFLOAT16)
    assert kernel_names(r.lowered) == ["onednn.qlinear with quantize", "onednn.qlinear"]
    qpass.lower(r.quantized, strict=True)


def test_without_a_compute_dtype_nothing_is_cast() -> None:
    assert "to.dtype" not in operators(run_stages(Do(lambda m, x: m.a(x) @ x.t(), a=nn.Linear(4, 4)), X).quantized)


def test_dynamic_parameters_are_chosen_in_float32() -> None:
    """Parameters of bfloat16 values would be bfloat16 themselves, with 8 bits."""
    from qpass.presets import int8_dynamic

    for granularity in ("token", "tensor"):
        config = int8_dynamic(granularity, compute_dtype=torch.bfloat16)  # type: ignore[arg-type]
        model = Do(lambda m, x, y: m.a(x @ y), a=nn.Linear(4, 4))
        gm = run_stages(model, torch.randn(2, 3, 4), torch.randn(2, 4, 4), config=config).quantized
        chosen = [node for node in gm.graph.nodes if "choose_qparams" in str(node.target)]
        assert [node.args[0].meta["val"].dtype for node in chosen] == [torch.float32]


SMALLEST = torch.finfo(torch.float32).min
"""What stands for minus infinity in a mask; bfloat16, whose largest number is smaller, rounds it to an infinity."""


def softmax_of_filled(m: Any, scores: Tensor, hidden: Tensor, x: Tensor) -> Tensor:
    return torch.softmax(scores.masked_fill(hidden, SMALLEST), -1) @ x


def softmax_of_sum(m: Any, scores: Tensor, hidden: Tensor, x: Tensor) -> Tensor:
    return torch.softmax(scores + torch.where(hidden, SMALLEST, 0.0).triu(0), -1) @ x


def softmax_of_sum_with_a_buffer(m: Any, scores: Tensor, hidden: Tensor, x: Tensor) -> Tensor:
    return torch.softmax(scores + m.mask.unsqueeze(0), -1) @ x


def attention(m: Any, scores: Tensor, hidden: Tensor, x: Tensor) -> Tensor:
    mask = (hidden.float() * SMALLEST).unsqueeze(0)
    return torch.nn.functional.scaled_dot_product_attention(scores, scores, x, attn_mask=mask)


@pytest.mark.parametrize("function", [softmax_of_filled, softmax_of_sum, softmax_of_sum_with_a_buffer, attention])
@torch.no_grad()
def test_a_row_that_is_all_masked_has_the_mean_of_all_values_and_no_nan(function: Callable[..., Any]) -> None:
    hidden = torch.ones(4, 4, dtype=torch.bool)
    hidden[1:, :2] = False
    model = Do(lambda m, x, hidden: function(m, m.a(x) @ x.mT, hidden, x), a=nn.Linear(4, 4)).eval()
    model.register_buffer("mask", hidden * SMALLEST)
    x = torch.linspace(-2, 2, 32).reshape(2, 4, 4).sin()
    prepared = qpass.prepare(model, (x, hidden), config=BFLOAT16)
    expected = prepared(x, hidden)
    # values up to 1 of which scores, probabilities and the values themselves are rounded to 8 bits
    torch.testing.assert_close(qpass.convert(prepared)(x, hidden), expected, atol=0.03, rtol=0)
    torch.testing.assert_close(expected[:, 0], x.mean(-2), atol=1e-6, rtol=0)
