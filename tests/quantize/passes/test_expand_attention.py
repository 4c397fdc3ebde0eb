from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from interpret import operators
from pass_run import run_once
from pipeline_run import STATIC, Do
from qpass.capture.export import capture
from qpass.ir.record import record_of
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.assign_compute_dtype import AssignComputeDtype
from qpass.quantize.passes.expand_attention import EXPAND, LONGEST, ExpandAttention
from qpass.targets import X86

aten = torch.ops.aten


def marked(length: int = 6, inputs: int = 3, **options: Any) -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """Attention as ``assign_compute_dtype`` leaves it."""
    given = tuple(torch.randn(2, 2, length, 4) for _ in range(inputs))
    gm = capture(Do(lambda m, q, k, v: F.scaled_dot_product_attention(q, k, v, **options)).eval(), given)
    Annotate(STATIC, X86).run(gm)
    AssignComputeDtype(torch.bfloat16, expand_attention=True).run(gm)
    return gm, given


def test_attention_becomes_two_products_and_a_softmax() -> None:
    gm, inputs = marked()
    before = gm(*inputs)
    (node,) = gm.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    record = record_of(node)
    assert run_once(ExpandAttention(), gm, *inputs) == 1
    assert operators(gm).splitlines()[3:] == [
        "transpose_int = transpose.int(inputs_1, -2, -1)",
        "mul_tensor = mul.Tensor(inputs_0, 0.5)",
        "matmul = matmul(mul_tensor, transpose_int)",
        "to_dtype = to.dtype(matmul, float32)",
        "softmax_int = softmax.int(to_dtype, -1)",
        "to_dtype_1 = to.dtype(softmax_int, float32)",
        "matmul_1 = matmul(to_dtype_1, inputs_2)",
        "return [matmul_1]",
    ]
    (result,) = gm.graph.output_node().all_input_nodes
    assert record_of(result) == record
    # In float32 the two forms differ by the order of sums of 4 and 6 values below 4: 10 * 2**-24 * 16.
    torch.testing.assert_close(gm(*inputs), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "scale": 2.0}])
def test_masks_and_scales(options: dict[str, Any]) -> None:
    gm, inputs = marked(**options)
    before = gm(*inputs)
    assert run_once(ExpandAttention(), gm, *inputs) == 1
    torch.testing.assert_close(gm(*inputs), before, atol=1e-5, rtol=0)  # as above


@pytest.mark.parametrize("name", ["mask", "long", "not asked"])
def test_near_misses(name: str) -> None:
    gm, inputs = marked(
        LONGEST + 1 if name == "long" else 6, **({"attn_mask": torch.zeros(6, 6)} if name == "mask" else {})
    )
    if name == "not asked":
        gm = capture(nn.Linear(4, 4), (inputs[0],))
    assert not any(EXPAND in node.meta for node in gm.graph.nodes)
    assert ExpandAttention().run(gm).changed == 0
