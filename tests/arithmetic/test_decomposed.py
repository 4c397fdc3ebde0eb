from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from qpass.arithmetic import decomposed
from qpass.arithmetic.decomposed import OPERATORS, graph_ops, overload, register


def test_the_namespace_is_torchs() -> None:
    assert graph_ops is torch.ops.quantized_decomposed
    assert decomposed._library is None  # torch has them all, so nothing was defined here


@pytest.mark.parametrize("name", OPERATORS)
def test_schema_is_torchs(name: str) -> None:
    schema, _ = OPERATORS[name]
    assert str(overload(name)._schema) == f"quantized_decomposed::{name}{schema}"


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_operators_are_defined_where_torch_has_none() -> None:
    code = """
import sys, torch
sys.modules["torch.ao.quantization.fx._decomposed"] = None
sys.modules["torchao.quantization.pt2e"] = None
from qpass.arithmetic.decomposed import OPERATORS, overload, graph_ops as qd, _library
assert _library is not None
assert all(str(overload(name)._schema) == f"quantized_decomposed::{name}{OPERATORS[name][0]}" for name in OPERATORS)
x = torch.tensor([0.5, 1.5, -9.0])
codes = qd.quantize_per_tensor.tensor(x, torch.tensor([0.1]), torch.tensor([3]), -8, 7, torch.int8)
print(codes.tolist(), qd.dequantize_per_tensor.default(codes, 0.5, 3, -8, 7, torch.int8).tolist())
meta = qd.choose_qparams_per_token(torch.empty(4, 8, device="meta"), torch.int8)
print([(tuple(t.shape), t.dtype) for t in meta])
"""
    assert run(code) == "[7, 7, -8] [2.0, 2.0, -5.5]\n[((4, 1), torch.float32), ((4, 1), torch.float32)]"


def test_register_from_many_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: register(), range(32))) == [None] * 32
    assert decomposed._missing() == []
