"""The corrected operators under ``torch.compile``: eager codes == Inductor codes; no process dies of random uses."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hard_values import ROWS, hard_values
from qpass.arithmetic.numerics import CODE_RANGES, EPS
from qpass.ops import graph_ops
from qpass.ops import quantized_decomposed as ops
from random_calls import FLOATS

SCALE = 0.0371
TYPES = [(torch.int8, -8, 7), *((dtype, *ends) for dtype, ends in CODE_RANGES.items())]


def quantizers(
    x: Tensor, half: Tensor, scales: Tensor, zero_points: Tensor, s: Tensor, z: Tensor, groups: Tensor, zeros: Tensor
) -> list[Tensor]:
    """Every type by channel, and in turn by tensor, token and group; float32 inputs, and in turn the other dtypes."""
    out = []
    for index, (dtype, low, high) in enumerate(TYPES):
        bounds = low, high, dtype
        values = (half, half.half(), x.double(), x)[index % 4]
        out.append(ops.quantize_per_channel(x, scales, zero_points, index % 2, *bounds))
        if index % 3 == 0:
            out.append(ops.quantize_per_tensor.tensor(values, s, z, *bounds))
        elif index % 3 == 1:
            out.append(ops.quantize_per_token(values, scales, zero_points, *bounds))
        else:
            out.append(ops.quantize_per_channel_group(values, groups, zeros, *bounds, ROWS // 4))
    return out


def dequantizers(codes: list[Tensor], scales: Tensor, zero_points: Tensor, s: Tensor, z: Tensor) -> list[Tensor]:
    out = []
    for index, (tensor, (dtype, low, high)) in enumerate(zip(codes, TYPES, strict=True)):
        bounds, wanted = (low, high, dtype), FLOATS[index % 4]
        out.append(ops.dequantize_per_channel(tensor, scales, zero_points, 1, *bounds, out_dtype=wanted))
        if index % 2:
            out.append(ops.dequantize_per_token(tensor, scales, zero_points, *bounds, wanted))
        else:
            out.append(ops.dequantize_per_tensor.tensor(tensor, s, z, *bounds, out_dtype=wanted))
    return out


def choosers(x: Tensor, half: Tensor) -> list[Tensor]:
    """Qparams of each dtype that is not computed in another of them."""
    out: list[Tensor] = []
    for values in (x, half.half(), x.double()):
        out += ops.choose_qparams.tensor(values, 0, 255, EPS, torch.uint8)
        out += ops.choose_qparams_symmetric.tensor(values, -8, 7, EPS, torch.int8)
        out += ops.choose_qparams_per_token(values, torch.int16)
        out += ops.choose_qparams_per_token_asymmetric(values, torch.uint8)
    return out


def inputs() -> tuple[Tensor, ...]:
    """x and its bfloat16 form, with NaN and infinities; qparams of channels, of the tensor and of groups."""
    x = hard_values(SCALE)
    x[:2, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    scales = torch.rand(ROWS) * 0.05 + 0.001
    scales[: ROWS // 2] = SCALE
    zero_points = torch.randint(-5, 5, (ROWS,), dtype=torch.int32)
    one = torch.tensor([SCALE]), torch.tensor([3], dtype=torch.int32)
    return x, x.bfloat16(), scales, zero_points, *one, scales.repeat(4, 1).t(), zero_points.repeat(4, 1).t()


def strides(t: Tensor) -> list[int]:
    """Of dimensions without extent strides say nothing."""
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1] if t.numel() else []


def differing(found: list[Tensor], expected: list[Tensor]) -> list[int]:
    """Of each output how many elements differ in a bit; NaN is equal to NaN."""
    counts = []
    for f, e in zip(found, expected, strict=True):
        assert (f.dtype, f.shape, strides(f)) == (e.dtype, e.shape, strides(e))
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[f.element_size()]
        unequal = f.reshape(-1).view(bits) != e.reshape(-1).view(bits)
        if f.dtype.is_floating_point:
            unequal &= ~(f.reshape(-1).double().isnan() & e.reshape(-1).double().isnan())
        counts.append(int(unequal.sum()))
    return counts


def compare(rounds: int) -> int:
    """Eager against compiled on fresh inputs; how many elements were compared."""
    compared = 0
    compiled = [torch.compile(function, dynamic=False) for function in (quantizers, dequantizers, choosers)]
    for _ in range(rounds):
        x, half, scales, zero_points, s, z, *groups = inputs()
        codes = quantizers(x, half, scales, zero_points, s, z, *groups)
        values = dequantizers(codes[::2], scales, zero_points, s, z)
        expected = [*codes, *values, *choosers(x[2:], half[2:])]
        found = compiled[0](x, half, scales, zero_points, s, z, *groups)
        found = [*found, *compiled[1](codes[::2], scales, zero_points, s, z), *compiled[2](x[2:], half[2:])]
        assert differing(found, expected) == [0] * len(expected)
        compared += sum(t.numel() for t in expected)
    return compared


def test_compiled_equals_eager() -> None:
    """10 million elements; half of the quantizers' inputs are ties of one scale or one float beside."""
    assert compare(1) > 10_000_000


@pytest.mark.slow
def test_compiled_equals_eager_on_a_hundred_million_elements() -> None:
    assert compare(10) > 100_000_000


def test_the_backend_takes_them_beside_the_operators_of_graphs() -> None:
    """Rows of tiny values: torch's operator has a floor of 1e-5 under them that the corrected one does not have."""
    x = torch.randn(4, 8) * torch.tensor([[1.0], [1e-5], [1e-6], [0.0]])

    def function(x: Tensor) -> list[Tensor]:
        out = []
        for namespace in (graph_ops, ops):
            s, z = namespace.choose_qparams_per_token(x, torch.int8)
            out += [s, z, namespace.quantize_per_token(x, s, z, -128, 127, torch.int8)]
        return out

    compiled = torch.compile(function, backend="qpass")
    with torch.no_grad():
        found, expected = compiled(x), function(x)
    assert differing(found, expected) == [0] * 6
    assert expected[0][3] < expected[3][3] == EPS


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_compiles_as_one_graph(backend: str) -> None:
    """Values and all gradients of fake_quant_per_channel and of q, dq: the same as eager, no graph break."""

    def function(x: Tensor, scales: Tensor, zero_points: Tensor) -> Tensor:
        y = ops.fake_quant_per_channel(x, scales, zero_points, -1, -8, 7)
        codes = ops.quantize_per_channel(y * 1.5, scales, zero_points, 1, -8, 7, torch.int8)
        return ops.dequantize_per_channel(codes, scales, zero_points, 1, -8, 7, torch.int8) * 2

    results = []
    x, scales = torch.randn(6, 40) * 3, torch.rand(40) + 0.1
    zero_points = torch.randint(-2, 3, (40,)).float()
    for run in (function, torch.compile(function, backend=backend, fullgraph=True)):
        leaves = [t.clone().requires_grad_() for t in (x, scales, zero_points)]
        out = run(*leaves)
        out.square().sum().backward()
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    for eager, compiled in zip(results[0][2:], results[1][2:], strict=True):
        assert eager.abs().max() > 1
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-4)  # sums over 6 rows in another order


USES = """
import sys, torch
from qpass.ops import quantized_decomposed
from qpass.arithmetic.decomposed import overload
from random_calls import calls
from torch.utils._pytree import tree_leaves
from test_compiled import differing

uses = calls(int(sys.argv[2]), seed=int(sys.argv[1]), wrong=0.0)
tensors = [[a for a in use.args if isinstance(a, torch.Tensor)] for use in uses]

def function(tensors):
    out = []
    for use, own in zip(uses, tensors):
        own = iter(own)
        args = [next(own) if isinstance(a, torch.Tensor) else a for a in use.args]
        out.append(overload(use.name, quantized_decomposed)(*args, **use.kwargs))
    return tree_leaves(out)

expected, found = function(tensors), torch.compile(function)(tensors)
assert differing(found, expected) == [0] * len(expected), [use.about for use in uses]
print(len(uses))
"""


def uses_that_worked(seed: int, count: int) -> int:
    """`count` random uses, compiled together in a process of their own; 0 if it died or was wrong."""
    tests = Path(__file__).resolve().parents[1]
    paths = f"import sys; sys.path[:0] = [{str(tests)!r}, {str(tests / 'support')!r}]\n"
    command = [sys.executable, "-W", "ignore", "-c", paths + USES, str(seed), str(count)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, f"seed {seed} ended with {result.returncode}:\n{result.stderr[-3000:]}"
    return int(result.stdout)


@pytest.mark.slow
def test_no_process_dies_of_random_compiled_uses() -> None:
    """2,000 uses of random overloads, dtypes and layouts, 100 to a process; each must also equal eager, bit for bit."""
    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(lambda seed: uses_that_worked(seed, 100), range(200, 220))) == 2000
