"""A weight alone in int8: which kernel multiplies it, how exact that is, and what the report says where none pays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import qpass
from interpret import operators
from pipeline_run import WEIGHT_BFLOAT16, Do, kernel_names, run_stages
from qpass.targets.x86 import weight_only

PACKED = "aten._weight_int8pack_mm"
CAST = "aten.mm (codes cast to bfloat16)"


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel is chosen is a matter of this machine; what it computes is not."""
    monkeypatch.setattr(weight_only, "bfloat16_is_fast", lambda: True)


def lowered(model: nn.Module, x: Tensor) -> tuple[fx.GraphModule, fx.GraphModule]:
    """``model`` for exactly this shape of ``x``, quantized and lowered."""
    whole = Do(lambda m, x: m.net(x.reshape(x.shape)), net=model).eval()
    prepared = qpass.prepare(whole, (x,), config=WEIGHT_BFLOAT16)
    assert torch.equal(prepared(x), model(x))
    quantized = qpass.convert(prepared)
    return quantized, qpass.lower(quantized)


@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 64), PACKED), ((5, 64), PACKED), ((8, 64), PACKED), ((2, 3, 64), PACKED), ((9, 64), CAST),
        ((4, 3, 64), CAST),
        ((4, 40), CAST), ((4, 3), CAST),  # rows of 40 values: the packed kernel would read beyond their end
    ],
)  # fmt: skip
@torch.no_grad()
def test_the_kernel_follows_the_rows_and_is_the_graph_but_for_the_last_bit_of_bfloat16(
    shape: tuple[int, ...], kernel: str
) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(shape[-1], 16), torch.randn(shape)
    quantized, fast = lowered(model, x)
    assert [name.partition(" chosen")[0] for name in kernel_names(fast)] == [kernel]
    reference = quantized(x)
    scale = model.weight.abs().amax(1) / 127
    weight = (model.weight / scale[:, None]).round() * scale[:, None]
    expected = nn.functional.linear(x.bfloat16().float(), weight, model.bias)
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=1e-4)  # the rows are rounded, and nothing else
    # The sum is rounded to 8 bits before the bias is added; 64 products of values below 4 add up in another order.
    bound = 2**-8 * (reference - model.bias).abs() + 1e-5
    assert bool(((fast(x) - reference).abs() <= bound).all())


@torch.no_grad()
def test_a_number_of_rows_that_is_not_known_is_that_of_the_example_and_the_report_says_so() -> None:
    for rows, kernel in ((4, PACKED), (12, CAST)):
        r = run_stages(nn.Linear(16, 8), torch.randn(rows, 16), config=WEIGHT_BFLOAT16)
        assert kernel_names(r.lowered) == [f"{kernel} chosen for about {rows} rows, as in the example"]
        for other in (1, 3, 20):
            x = torch.randn(other, 16)
            torch.testing.assert_close(r.lowered(x), r.quantized(x), atol=2**-8 * 4, rtol=0)  # sums below 4


@torch.no_grad()
def test_a_large_weight_is_cast_in_blocks_and_stored_as_codes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "BLOCK", 4 * 40)
    quantized, fast = lowered(nn.Linear(40, 10, bias=False), x := torch.randn(12, 40))
    text = operators(fast)
    blocks = [f"= slice.Tensor(net.weight_codes, 0, {part})" in text for part in ("0, 4", "4, 8", "8, 10")]
    assert (blocks, text.count(" = mm(")) == ([True] * 3, 3), text
    assert sum(t.numel() * t.element_size() for t in fast.state_dict().values()) == 400 + 10 * 4
    torch.testing.assert_close(fast(x), quantized(x), atol=1e-5, rtol=2**-8)


@torch.no_grad()
def test_rows_at_odd_addresses() -> None:
    """One row of a wider one is contiguous and starts anywhere; the packed kernel loads whole vectors."""
    model = Do(lambda m, x: m.fc(m.first(x)[:, 1:]), first=nn.Linear(16, 33), fc=nn.Linear(32, 8)).eval()
    x = torch.randn(1, 16)
    quantized = qpass.convert(qpass.prepare(model, (x,), config=WEIGHT_BFLOAT16))
    fast: Any = qpass.lower(quantized)
    assert [name.partition(" chosen")[0] for name in kernel_names(fast)] == [PACKED, PACKED]
    for _ in range(20):
        torch.testing.assert_close(fast(x), quantized(x), atol=0.05, rtol=0)  # two sums of 8 bits, below 4


def test_a_cpu_without_bfloat16_declines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_only, "bfloat16_is_fast", lambda: False)
    _, slow = lowered(nn.Linear(16, 8), torch.randn(4, 16))
    why = "slower than in float: this CPU has no instructions for bfloat16"
    assert kernel_names(slow) == [f"linear on a dequantized weight {why}"]
    assert [t.dtype for t in slow.state_dict().values() if t.dim() == 2] == [torch.int8]


@torch.no_grad()
def test_compiled_as_lowered() -> None:
    for rows in (1, 12):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 33), nn.ReLU(), nn.Linear(33, 16), nn.Linear(16, 8)).eval()
        torch._dynamo.reset()
        compiled: Any = torch.compile(model, backend="qpass", options={"config": WEIGHT_BFLOAT16})
        x = torch.randn(rows, 32)
        signal = model(x)
        noise = (compiled(x) - signal).square().mean()
        assert 10 * torch.log10(signal.square().mean() / noise) > 30  # 8 bits of weights and rows: 38 to 45 dB
        kernels = [row.kernel for row in qpass.report(compiled).rows if row.kernel]
        assert kernels == ([PACKED, CAST, PACKED] if rows == 1 else [CAST] * 3)
