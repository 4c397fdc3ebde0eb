"""Every weight that stays in float is counted once, at the operation that reads it, with the reason why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qpass
from pipeline_run import STATIC, WEIGHT_ONLY, Do
from qpass.errors import StrictError
from qpass.patterns import CARRIED, OF_WEIGHTS

aten = torch.ops.aten
DYNAMIC = qpass.presets.int8_dynamic(compute_dtype=None)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4)


def report(function: Callable[..., Any], config: Any = DYNAMIC, **members: Any) -> Any:
    """The report on a model that has one linear of 8 x 8 besides, whose bias is 32 bytes."""
    model = Do(lambda m, x: function(m, m.fc(x)), fc=nn.Linear(8, 8), **members).eval()
    prepared = qpass.prepare(model, (torch.randn(5, 8),), config=config)
    prepared(torch.randn(5, 8))
    return qpass.report(qpass.convert(prepared))


def experts(m: Any, x: Tensor) -> Tensor:
    return torch.bmm(x.expand(3, -1, -1), m.w.transpose(1, 2))


# operator, what the model computes with it, what it holds, the reason
LEFT: list[tuple[str, Callable[..., Any], dict[str, Any], str]] = [
    ("bmm", experts, {"w": weight(3, 6, 8)}, OF_WEIGHTS[aten.bmm.default]),
    ("bmm", lambda m, x: torch.bmm(x[:, None], m.w.expand(x.shape[0], -1, -1)), {"w": weight(8, 6)},
     OF_WEIGHTS[aten.bmm.default]),
    ("matmul", lambda m, x: x @ m.w, {"w": weight(3, 8, 6)}, "the stored operand is not a matrix"),
    ("matmul", lambda m, x: m.w @ x[0], {"w": weight(6, 8)},
     "the stored operand stands on the left, and kernels take it on the right"),
    ("linear", lambda m, x: F.linear(m.w, x), {"w": weight(6, 8)},
     "a stored matrix stands in the place of the input, and the weight is computed"),
    ("embedding_bag.padding_idx", lambda m, x: m.bag(x.argmax(1, keepdim=True)), {"bag": nn.EmbeddingBag(9, 4)},
     OF_WEIGHTS[aten.embedding_bag.padding_idx]),
    ("embedding", lambda m, x: m.table(x.argmax(1)), {"table": nn.Embedding(9, 4, max_norm=1.0)},
     "the model writes to the table when it looks rows up, as max_norm does"),
    ("index.Tensor", lambda m, x: m.w[x.argmax(1)], {"w": weight(8, 6)}, OF_WEIGHTS[aten.index.Tensor]),
    ("lstm.input", lambda m, x: m.rnn(x[None])[0], {"rnn": nn.LSTM(8, 4, num_layers=2)},
     OF_WEIGHTS[aten.lstm.input]),
    ("gru.input", lambda m, x: m.rnn(x[None])[0], {"rnn": nn.GRU(8, 4)}, OF_WEIGHTS[aten.gru.input]),
    ("rnn_tanh.input", lambda m, x: m.rnn(x[None])[0], {"rnn": nn.RNN(8, 4)}, OF_WEIGHTS[aten.rnn_tanh.input]),
    ("gru_cell", lambda m, x: m.cell(x), {"cell": nn.GRUCell(8, 4)}, OF_WEIGHTS[aten.gru_cell.default]),
    ("conv_transpose1d", lambda m, x: m.conv(x[None]), {"conv": nn.ConvTranspose1d(5, 4, 3)},
     OF_WEIGHTS[aten.conv_transpose1d.default]),
    ("bilinear", lambda m, x: m.pair(x, x), {"pair": nn.Bilinear(8, 8, 3)}, OF_WEIGHTS[aten.bilinear.default]),
    ("cdist", lambda m, x: torch.cdist(x, m.w), {"w": weight(6, 8)}, "no pattern of the catalogue covers it"),
]  # fmt: skip


@pytest.mark.parametrize(("op", "function", "members", "why"), LEFT, ids=[one[0] for one in LEFT])
def test_what_no_pattern_reaches_has_a_row(
    op: str, function: Callable[..., Any], members: dict[str, Any], why: str
) -> None:
    found = report(function, **members)
    size = sum(p.numel() * 4 for m in members.values() for p in ([m] if isinstance(m, Tensor) else m.parameters()))
    row = next(row for row in found.rows if row.op == op and row.module != "fc")
    assert (row.outcome, row.reason, row.float_bytes, row.missed) == ("float", why, size, True)
    assert found.missed == (row,)
    assert (found.weight_bytes, found.weight_bytes_kept) == (size + 288, size + 32)


# What is no weight of a product is counted, and nobody asked for it to be quantized.
NOT_ASKED: list[tuple[str, Callable[..., Any], dict[str, Any]]] = [
    ("add.Tensor", lambda m, x: x + m.w, {"w": weight(5, 8)}),
    ("mul.Tensor", lambda m, x: x * m.w, {"w": weight(1, 8)}),
    ("cat", lambda m, x: torch.cat([x, m.w]), {"w": weight(2, 8)}),
    ("layer_norm", lambda m, x: m.norm(x), {"norm": nn.LayerNorm(8)}),
    ("prelu", lambda m, x: m.act(x), {"act": nn.PReLU(8)}),
]


@pytest.mark.parametrize(("op", "function", "members"), NOT_ASKED, ids=[one[0] for one in NOT_ASKED])
def test_what_is_added_or_scaled_with_is_counted_and_not_missed(
    op: str, function: Callable[..., Any], members: dict[str, Any]
) -> None:
    model = Do(lambda m, x: function(m, x), **members, fc=nn.Linear(8, 8))
    size = sum(p.numel() * 4 for p in model.parameters()) - 288
    found = report(lambda m, x: function(m, x.relu()), **members)
    assert [row.float_bytes for row in found.rows if row.op == op] == [size]
    assert (found.missed, found.weight_bytes_kept) == ((), size + 32)


def test_a_weight_counts_once_however_often_and_by_whichever_name_it_is_read() -> None:
    w = weight(3, 8, 8)
    found = report(lambda m, x: m.v @ (m.w @ x.t()), w=w, v=w)
    assert [row.float_bytes for row in found.rows if row.op == "matmul"] == [768, 0]
    assert [row.missed for row in found.rows if row.op == "matmul"] == [True, True]
    assert (found.weight_bytes, found.weight_bytes_kept) == (768 + 288, 768 + 32)


def test_of_a_weight_that_is_read_in_parts_the_parts_in_float_count() -> None:
    """Rows 0 to 3 go to a linear, rows 4 to 7 stand where its input belongs."""
    found = report(lambda m, x: (F.linear(x, m.w[:4]), F.linear(m.w[4:], x)), w=weight(8, 8))
    assert [(row.outcome, row.float_bytes) for row in found.rows if row.op == "linear"] == [
        ("quantized", 32), ("quantized", 0), ("float", 128),
    ]  # fmt: skip
    assert (found.weight_bytes, found.weight_bytes_kept) == (256 + 288, 128 + 32)


def test_buffers_that_the_model_writes_to_are_no_weights() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)
            self.register_buffer("sums", torch.zeros(64, 8))
            self.register_buffer("scale", torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            self.sums.add_(1)
            return self.fc(x) * self.scale + self.sums[0]

    found = qpass.report(qpass.prepare(Counter().eval(), (torch.randn(4, 8),), config=DYNAMIC))
    assert (found.weight_bytes, found.weight_bytes_kept) == (288 + 32, 32 + 32)


def test_a_weight_that_a_loop_carries_has_a_row() -> None:
    def loop(m: Any, x: Tensor) -> Tensor:
        from torch._higher_order_ops import while_loop  # importing it is slow

        def step(i: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return i + 1, w + 1, y + F.linear(y, w)

        return while_loop(lambda i, w, y: i < 2, step, (torch.zeros((), dtype=torch.int64), m.w, x))[2]

    found = report(loop, w=weight(8, 8))
    assert {(row.op, row.reason): row.float_bytes for row in found.missed} == {
        ("while_loop", CARRIED): 256,
        ("linear", "the weight is computed, not stored"): 0,
    }


def test_strict_refuses_what_was_asked_for_and_not_what_the_user_left_in_float() -> None:
    model = Do(lambda m, x: experts(m, m.fc(x)), fc=nn.Linear(8, 8), w=weight(3, 6, 8)).eval()
    x = torch.randn(5, 8)
    with pytest.raises(StrictError, match=r"bmm.*batch of matrices"):
        qpass.convert(qpass.prepare(model, (x,), config=DYNAMIC), strict=True)
    with pytest.raises(StrictError, match=r"bmm.*batch of matrices"):
        qpass.report(qpass.convert(qpass.prepare(model, (x,), config=DYNAMIC)), strict=True)
    accepted = qpass.convert(qpass.prepare(model, (x,), config=DYNAMIC.keep_float(op="bmm")), strict=True)
    found = qpass.report(accepted, strict=True)
    row = next(row for row in found.rows if row.op == "bmm")
    assert (row.reason, row.float_bytes) == ("override 0 of the configuration leaves it in float", 576)


@pytest.mark.parametrize("config", [STATIC, WEIGHT_ONLY], ids=["static", "weight only"])
def test_the_first_lines_say_what_share_stays_in_float(config: Any) -> None:
    found = report(lambda m, x: m.bag(x.argmax(1, keepdim=True)), config, bag=nn.EmbeddingBag(100, 32))
    line = "  weights     98.0 % of their bytes stay in float (12.83 kB of 13.09 kB)"
    assert str(found).splitlines()[3] == line
    assert found.to_dict()["kept_share"] == pytest.approx(12_832 / 13_088)
    assert "98.0 % of their bytes stay in float" in found._repr_mimebundle_()["text/html"]
    table = str(found).split("\n\n")[2].splitlines()
    assert table[0].split("  ")[-1] == "kernel or reason"
    assert next(line for line in table if line.startswith("bag")).split()[-3:] == ["12.80", "kB", "[1]"]
