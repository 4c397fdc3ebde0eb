from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pipeline_run import PER_TENSOR, PER_TOKEN, STATIC, WEIGHT_ONLY, Do, run_stages
from qpass.capture.export import capture
from qpass.ir.constants import Constants
from qpass.islands.island import qparams_op, spec_of, uncast
from qpass.islands.qdq import QParams, as_dequantize, as_quantize, cast_of, only_quantize
from qpass.ops import graph_ops as ops
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec

BYTE = (0, 255, torch.uint8)
SIGNED = (-127, 127, torch.int8)


def pairs(gm: fx.GraphModule) -> list[QParams]:
    found = [as_dequantize(node) for node in gm.graph.nodes]
    return [pair.qparams for pair in found if pair is not None]


def pair_of(function: Any, *inputs: Tensor) -> tuple[Any, Any]:
    """The one quantize and the one dequantize node that a function makes."""
    gm = capture(Do(lambda m, *given: function(*given)), inputs)
    quantized = [pair for node in gm.graph.nodes if (pair := as_quantize(node)) is not None]
    dequantized = [pair for node in gm.graph.nodes if (pair := as_dequantize(node)) is not None]
    return quantized[0], dequantized[0]


def test_static() -> None:
    def rounded(x: Tensor) -> Tensor:
        codes = ops.quantize_per_tensor.default(torch.sin(x), 0.5, 3, *BYTE)
        return ops.dequantize_per_tensor.default(codes, 0.5, 3, *BYTE)

    q, dq = pair_of(rounded, torch.randn(4, 4))
    assert q.qparams == dq.qparams == QParams(PerTensor(), 0.5, 3, *BYTE)
    assert dq.value is q.node
    assert q.value.name == "sin"
    assert q.qparams.is_static
    assert q.qparams.fills_dtype
    assert only_quantize(q.value) is not None
    assert only_quantize(q.node) is None


@pytest.mark.parametrize(("granularity", "quantize", "dequantize", "tail"), [
    (PerChannel(1), ops.quantize_per_channel, ops.dequantize_per_channel, (1, *SIGNED)),
    (PerToken(), ops.quantize_per_token, ops.dequantize_per_token, SIGNED),
    (PerGroup(2), ops.quantize_per_channel_group, ops.dequantize_per_channel_group, (*SIGNED, 2)),
])  # fmt: skip
def test_every_granularity_reads_alike(granularity: Any, quantize: Any, dequantize: Any, tail: tuple[Any, ...]) -> None:
    scales = torch.ones((4,) if isinstance(granularity, PerChannel) else (4, 2 if tail[-1] == 2 else 1))

    def rounded(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = quantize.default(x, scale, zero_point, *tail)
        dtype = () if isinstance(granularity, PerChannel) else (torch.float32,)
        return dequantize.default(codes, scale, zero_point, *tail, *dtype)

    q, dq = pair_of(rounded, torch.randn(4, 4), scales, torch.zeros_like(scales, dtype=torch.int64))
    for pair in (q, dq):
        assert (pair.qparams.granularity, pair.qparams.dtype) == (granularity, torch.int8)
        assert (pair.qparams.quant_min, pair.qparams.quant_max) == (-127, 127)
        assert pair.qparams.scale.name == "inputs_1"
        assert pair.qparams.zero_point.name == "inputs_2"
        assert not pair.qparams.is_static
        assert not pair.qparams.fills_dtype


def test_other_nodes_are_no_pair() -> None:
    gm = capture(Do(lambda m, x: x.to(torch.bfloat16).to(torch.float32)), (torch.randn(4),))
    assert [as_quantize(node) or as_dequantize(node) for node in gm.graph.nodes] == [None] * len(gm.graph.nodes)
    down, up = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.to.dtype)
    assert (cast_of(down), cast_of(up)) == (down.args[0], down)
    assert cast_of(down, torch.float32) is None
    assert uncast(up) is down
    assert uncast(down) is down


SPECS = {
    "static": (STATIC, [STATIC.weight, STATIC.activation]),
    "tensor": (PER_TENSOR, [PER_TENSOR.weight, PER_TENSOR.activation]),
    "token": (PER_TOKEN, [PER_TOKEN.weight, PER_TOKEN.activation]),
    "weight": (WEIGHT_ONLY, [WEIGHT_ONLY.weight]),
}


@pytest.mark.parametrize("name", SPECS)
def test_the_spec_that_was_asked_for_is_the_spec_that_is_read(name: str) -> None:
    config, expected = SPECS[name]
    gm = run_stages(torch.nn.Linear(16, 8), torch.randn(4, 16), config=config).quantized
    read = [spec_of(qparams, Constants(gm)) for qparams in pairs(gm)]
    # The observer is chosen in `prepare`; the graph does not say which it was.
    assert read == [QuantizationSpec(s.dtype, s.granularity, s.symmetric, s.dynamic, *s.range) for s in expected if s]


def test_a_dynamic_zero_point_names_the_operator_that_chose_it() -> None:
    gm = run_stages(torch.nn.Linear(16, 8), torch.randn(4, 16), config=PER_TENSOR).quantized
    dynamic = next(qparams for qparams in pairs(gm) if isinstance(qparams.granularity, PerTensor))
    assert qparams_op(dynamic.zero_point) is ops.choose_qparams.tensor
