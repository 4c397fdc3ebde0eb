"""What is wrong with torch's operators and right in qpass's: the same probe of both, and what it has to say.

Each row fails when torch's answer is the right one: then the defect is gone there. ``pytest -s`` prints the answers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qpass.arithmetic.numerics import EPS, FLOAT8_RANGES
from qpass.ops import graph_ops, quantized_decomposed

I8, I4, I32 = (-128, 127, torch.int8), (-8, 7, torch.int8), (-(2**31), 2**31 - 1, torch.int32)
SQUARE = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
ONES, NONE = torch.ones(2), torch.zeros(2, dtype=torch.int32)


def answer(probe: Callable[[Any], Any], ops: Any) -> Any:
    """What the probe says of the operators, as plain values; an exception is an answer, too."""
    try:
        found = probe(ops)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return found.tolist() if isinstance(found, Tensor) else found


def types(device: str) -> Callable[[Any], list[str]]:
    return lambda ops: [str(t.dtype) for t in ops.choose_qparams_per_token(torch.ones(2, 4, device=device), torch.int8)]


def on_meta(probe: Callable[[Any, Callable[[Tensor], Tensor]], Any]) -> Callable[[Any], list[Any]]:
    """Two answers: of real tensors, and of meta tensors."""

    def both(ops: Any) -> list[Any]:
        def shown(result: Any) -> Any:
            return [(str(t.dtype), tuple(t.stride())) for t in (result if isinstance(result, tuple) else (result,))]

        moves: tuple[Callable[[Tensor], Tensor], ...] = (lambda t: t, lambda t: t.to("meta"))
        return [answer(lambda ops, move=move: shown(probe(ops, move)), ops) for move in moves]

    return both


def codes_that_change_when_compiled(ops: Any) -> int:
    """Codes of -8..7 at and beside ties, with a zero point: how many differ under Inductor."""
    x = torch.cat([torch.randn(997), (torch.arange(-20, 20) + 0.5) * 0.1, torch.tensor([1e4, -1e4])])
    scale, zero_point = torch.tensor([0.1]), torch.tensor([3])

    def function(x: Tensor) -> Tensor:
        return ops.quantize_per_tensor.tensor(x, scale, zero_point, *I4)

    return int((torch.compile(function)(x) != function(x)).sum())


def half_compiled(ops: Any) -> Tensor:
    return torch.compile(lambda x: ops.quantize_per_tensor(x, 0.5, 0, *I8))(SQUARE.half())


def codes_of_nan(ops: Any) -> list[str]:
    """Every answer to NaN: of four granularities, eager, traced and compiled."""
    x = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])
    column, none = torch.ones(2, 1), torch.zeros(2, 1)
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "tensor": lambda x: ops.quantize_per_tensor(x, 1.0, 3, *I8),
        "channel": lambda x: ops.quantize_per_channel(x, ONES, NONE + 3, 0, *I8),
        "token": lambda x: ops.quantize_per_token(x, column, none, *I8),
        "group": lambda x: ops.quantize_per_channel_group(x, column, none, *I8, 2),
        "fake": lambda x: ops.fake_quant_per_channel(x, ONES, NONE, 0, -128, 127),
    }
    together = torch.compile(lambda x: [function(x) for name, function in functions.items() if name != "group"])
    found = [answer(lambda _, f=function: float(f(x)[0, 0]), ops) for function in functions.values()]
    return sorted({str(found) for found in [*found, *(float(codes[0, 0]) for codes in together(x))]})


def reads_of_groups(ops: Any) -> int:
    """How often the host waits for a value of a tensor."""
    with torch.autograd.profiler.profile() as profile:
        ops.quantize_per_channel_group(torch.ones(2, 4), torch.ones(2, 2), torch.zeros(2, 2), *I8, 2)
    return sum(event.name == "aten::_local_scalar_dense" for event in profile.function_events)


def gradient(ops: Any, of: str) -> Any:
    x = torch.tensor([[0.375, 5.0], [0.75, -9.0]], requires_grad=True)
    scales = torch.tensor([0.5, 1.0], requires_grad=of == "scales")
    if of == "scales":
        values = ops.fake_quant_per_channel(x, scales, NONE, 0, -4, 3)
    else:
        codes = ops.quantize_per_channel(x, scales, NONE, 0, -4, 3, torch.int8)
        values = ops.dequantize_per_channel(codes, scales, NONE, 0, -4, 3, torch.int8)
    values.sum().backward()
    return (scales if of == "scales" else x).grad


def in_inference_mode(ops: Any) -> Tensor:
    with torch.inference_mode():
        return ops.fake_quant_per_channel(SQUARE, ONES, NONE, 0, -8, 7)


def finite_qparams(value: float) -> Callable[[Any], Any]:
    def probe(ops: Any) -> Any:
        scale, zero_point = ops.choose_qparams.tensor(torch.tensor([1.0, value]), 0, 255, EPS, torch.uint8)
        return bool(scale.isfinite().all()), bool(((zero_point >= 0) & (zero_point <= 255)).all())

    return probe


def float8(dtype: torch.dtype) -> Callable[[Any], int]:
    """How many of many codes differ from the cast of the scaled values."""
    low, high = FLOAT8_RANGES[dtype]
    x = torch.randn(4096) * torch.logspace(-4, 2, 4096) * 0.25
    expected = (x * 4).clamp(low, high).to(dtype).view(torch.uint8)
    return lambda ops: int((ops.quantize_per_tensor(x, 0.25, 0, low, high, dtype).view(torch.uint8) != expected).sum())


def stored_as(dtype: torch.dtype) -> str:
    return f"InputError: Codes cannot be stored as {dtype}"


BELOW = "InputError: A code of -200 does not fit torch.int8, which holds -128..127"
STRIDED = torch.arange(8.0).reshape(4, 2).t()
F32 = "torch.float32"

ROWS: list[tuple[str, Callable[[Any], Any], Any]] = [
    ("Meta of choose_qparams_per_token lies: compiled code corrupts memory", types("meta"), [F32, F32]),
    (".tensor compiled ignores bounds, ties and zero points", codes_that_change_when_compiled, 0),
    (
        "one scale for two channels",
        lambda ops: ops.quantize_per_channel(SQUARE, torch.ones(1), NONE[:1], 0, *I8),
        "InputError: 1 scales for the 2 indices of dimension 0.",
    ),
    (
        "flat per-token scales taken for columns",
        lambda ops: ops.quantize_per_token(SQUARE, torch.tensor([1.0, 0.5]), torch.zeros(2), *I8),
        [[1, 2], [6, 8]],
    ),
    (
        "three scales for one row",
        lambda ops: ops.dequantize_per_token(torch.ones(1, 2).char(), torch.ones(3, 1), torch.zeros(3, 1), *I8,
                                             torch.float32),
        "InputError: 3 scales for 1 rows.",
    ),
    (
        "fake_quant_per_channel with axis -1 returns another dimension",
        lambda ops: list(ops.fake_quant_per_channel(torch.ones(3, 2), ONES, NONE, -1, -8, 7).shape),
        [3, 2],
    ),
    (
        "fake_quant_per_channel with axis -5",
        lambda ops: ops.fake_quant_per_channel(SQUARE, ONES, NONE, -5, -8, 7),
        "InputError: axis -5 is out of range for a tensor of 2 dimensions",
    ),
    (
        "a narrow zero point wraps",
        lambda ops: ops.dequantize_per_channel(torch.full((1, 1), -128, dtype=torch.int8), torch.ones(1),
                                               torch.tensor([100], dtype=torch.int8), 0, *I8),
        [[-228.0]],
    ),
    (
        "an int32 code overflows",
        lambda ops: ops.quantize_per_tensor(torch.tensor([1e10, -1e10]), 1.0, 0, *I32),
        [2**31 - 1, -(2**31)],
    ),
    (
        "an int32 zero point is added in float32",
        lambda ops: ops.quantize_per_tensor(torch.tensor([1.0, 100.0]), 1.0, 2**30 + 1, *I32),
        [2**30 + 2, 2**30 + 101],
    ),
    *((f"{dtype} is rounded to integers first, or refused", float8(dtype), 0) for dtype in FLOAT8_RANGES),
    ("NaN has many answers", codes_of_nan, ["-128.0"]),
    ("qparams of NaN", finite_qparams(torch.nan), (True, True)),
    ("qparams of infinity", finite_qparams(torch.inf), (True, True)),
    (
        "qparams of nothing: an error, and none on meta",
        on_meta(lambda ops, move: ops.choose_qparams.tensor(move(torch.empty(0)), 0, 255, EPS, torch.uint8)),
        [[("torch.float64", (1,)), ("torch.int64", (1,))]] * 2,
    ),
    (
        "int4 storage is refused, and not on meta",
        on_meta(lambda ops, move: ops.quantize_per_tensor(move(SQUARE), 1.0, 0, -8, 7, torch.int4)),
        [stored_as(torch.int4)] * 2,
    ),
    (
        "uint4 storage is refused, and not on meta",
        on_meta(lambda ops, move: ops.quantize_per_tensor(move(SQUARE), 1.0, 0, 0, 15, torch.uint4)),
        [stored_as(torch.uint4)] * 2,
    ),
    (
        "bounds are not checked on meta",
        on_meta(lambda ops, move: ops.quantize_per_tensor(move(SQUARE), 1.0, 0, -200, 127, torch.int8)),
        [BELOW] * 2,
    ),
    (
        "float64 is refused",
        lambda ops: ops.quantize_per_channel(SQUARE.double(), ONES, NONE, 0, *I8),
        [[1, 2], [3, 4]],
    ),
    ("float16 does not compile", half_compiled, [[2, 4], [6, 8]]),
    (
        "groups need two dimensions",
        lambda ops: ops.quantize_per_channel_group(SQUARE[None], torch.ones(1, 2, 1), torch.zeros(1, 2, 1), *I8, 2),
        [[[1, 2], [3, 4]]],
    ),
    (
        "groups of one are refused",
        lambda ops: ops.quantize_per_channel_group(SQUARE, SQUARE, SQUARE * 0, *I8, 1),
        [[1, 1], [1, 1]],
    ),
    (
        "groups have other strides than meta says",
        on_meta(lambda ops, move: ops.quantize_per_channel_group(move(STRIDED), move(torch.ones(2, 2)),
                                                                 move(torch.zeros(2, 2)), *I8, 2)),
        [[("torch.int8", (1, 2))]] * 2,
    ),
    ("groups wait for the host", reads_of_groups, 0),
    ("fake_quant_per_channel in inference mode", in_inference_mode, [[1.0, 2.0], [3.0, 4.0]]),
    ("no gradient to scales", lambda ops: gradient(ops, "scales"), [(1 - 0.75) + 3, (1 - 0.75) - 4]),
    ("no straight-through gradient of q, dq", lambda ops: gradient(ops, "input"), [[1.0, 0.0], [1.0, 0.0]]),
    (
        "per-token qparams are int8's whatever the dtype",
        lambda ops: [float(t) for t in ops.choose_qparams_per_token_asymmetric(torch.tensor([[0.0, 255.0]]),
                                                                               torch.uint8)],
        [1.0, 0.0],
    ),
    (
        "per-token scales of uint8 are refused",
        lambda ops: [float(t) for t in ops.choose_qparams_per_token(torch.tensor([[-127.0, 1.0]]), torch.uint8)],
        [1.0, 128.0],
    ),
    (
        "per-token scales have a floor of 1e-5 / 127",
        lambda ops: float(ops.choose_qparams_per_token(torch.zeros(1, 2), torch.int8)[0]),
        EPS,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("defect", "probe", "right"), ROWS, ids=[row[0] for row in ROWS])
def test_torch_is_wrong_and_qpass_is_right(defect: str, probe: Callable[[Any], Any], right: Any) -> None:
    torchs, ours = answer(probe, graph_ops), answer(probe, quantized_decomposed)
    print(f"\n{defect}\n  torch {torchs}\n  qpass {ours}")
    assert torchs != right
    assert ours == right


def test_what_callers_may_pass_as_with_torchs() -> None:
    """A tensor for the float `eps`, and negative scales, which negate the codes."""
    for ops in (graph_ops, quantized_decomposed):
        found = ops.choose_qparams.tensor(SQUARE, 0, 255, torch.Tensor([0.5]), torch.uint8)
        assert [t.tolist() for t in found] == [[0.5], [0]]
        assert ops.quantize_per_tensor(SQUARE, -0.5, 0, *I8).tolist() == [[-2, -4], [-6, -8]]
        assert ops.quantize_per_channel(SQUARE, -ONES, NONE, 0, *I8).tolist() == [[-1, -2], [-3, -4]]
