from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from interpret import operators
from pipeline_run import PER_TOKEN, STATIC, WEIGHT_ONLY, Do, kernel_names, reason, run_stages, same
from qpass.spec import PerChannel, PerTensor, QuantizationSpec
from qpass.spec.config import Config

IDS = torch.tensor([[3, 1, 19], [0, 3, 7]])


def test_only_the_rows_that_are_looked_up_are_dequantized() -> None:
    r = run_stages(nn.Embedding(20, 16), IDS, config=WEIGHT_ONLY)
    assert (
        operators(r.prepared)
        == """\
input_1 = input
observer_0 = observer_0(weight)
embedding = embedding(observer_0, input_1)
return [embedding]"""
    )
    assert (
        operators(r.quantized)
        == """\
input_1 = input
dequantize_per_channel = dequantize_per_channel(codes(weight), 0, -127, 127, int8)
embedding = embedding(dequantize_per_channel, input_1)
return [embedding]"""
    )
    assert (
        operators(r.lowered)
        == """\
input_1 = input
embedding = embedding(weight_codes, input_1)
index_tensor = index.Tensor(weight_scale, [input_1])
unsqueeze = unsqueeze(index_tensor, -1)
to_dtype = to.dtype(embedding, float32)
mul_tensor = mul.Tensor(to_dtype, unsqueeze)
return [mul_tensor]"""
    )
    assert same(r.lowered(IDS), r.quantized(IDS))  # the same product of the same two numbers


@pytest.mark.parametrize("config", [STATIC, PER_TOKEN, WEIGHT_ONLY], ids=["static", "token", "w"])
def test_every_preset_rounds_the_table_alike(config: Config) -> None:
    r = run_stages(nn.Embedding(20, 16, padding_idx=3), IDS, config=config)
    assert kernel_names(r.lowered) == ["int8 gather"]
    table = r.quantized.weight_codes
    assert table.dtype == torch.int8
    assert not hasattr(r.quantized, "weight")
    assert torch.equal(r.lowered(IDS), (table.float() * r.quantized.weight_scale[:, None])[IDS])


def test_a_table_shared_with_a_linear_is_rounded_once_for_each_use() -> None:
    r = run_stages(Do(lambda m, ids: F.linear(m.e(ids), m.e.weight), e=nn.Embedding(20, 16)), IDS)
    assert kernel_names(r.lowered) == ["int8 gather", "onednn.qlinear"]


NEAR_MISSES = {
    "a computed table": (Do(lambda m, ids: F.embedding(ids, ids.float()[:, :2].t())), WEIGHT_ONLY.weight,
                         "the table is computed, not stored"),
    "one scale for all": (nn.Embedding(20, 16), QuantizationSpec(torch.int8, PerTensor()),
                          "the table needs one scale per row"),
    "affine rows": (nn.Embedding(20, 16), QuantizationSpec(torch.int8, PerChannel(0), symmetric=False),
                    "the table is quantized symmetrically"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses(name: str) -> None:
    model, weight, expected = NEAR_MISSES[name]
    ids = torch.tensor([[0, 1], [1, 0]]) if "computed" in name else IDS
    assert reason(model, ids, config=Config(weight=weight), op="embedding") == expected
