"""qpass::encode, decode, decode_reduce: eager, compiled by themselves, and in the graphs of others: the same bits."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from qpass import comm
from qpass.comm.wire import compiled_kernels as wire_compiled
from qpass.comm.wire.operators import FORMULAS, decode_reduce_into, encode_into
from qpass.errors import InputError

ops = torch.ops.qpass


def hostile(numel: int) -> Tensor:
    """Values of all sizes, with what is not finite, subnormal, or zero throughout a block."""
    x = torch.randn(numel) * torch.randn(numel).exp()
    x[5], x[300], x[-1] = float("nan"), float("inf"), -float("inf")
    x[512:1024] = 0
    x[1024:2048] *= 1e-39
    return x


@pytest.mark.parametrize("form", ["int8:128:bf16", "int4:32:bf16:stochastic", "fp8_e4m3:128:bf16", "bf16"])
def test_opcheck(form: str) -> None:
    for x in (torch.randn(3, 100, requires_grad=True), torch.randn(40, 7).t(), torch.empty(0)):
        torch.library.opcheck(ops.encode.default, (x, form, 7))
        payload = ops.encode(x, form)
        assert not payload.requires_grad
        torch.library.opcheck(ops.decode.default, (payload, x.numel(), torch.bfloat16, form))
        both = torch.stack([payload, payload])
        torch.library.opcheck(ops.decode_reduce.default, (both, x.numel(), torch.float32, form, 2))


def test_a_sum_is_taken_in_the_order_of_the_ranks() -> None:
    codec = comm.codec("fp32")
    values = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]  # (1e8 + 1) - 1e8 is 0 in float32
    payloads = torch.stack([codec.encode(value) for value in values])
    assert codec.decode_reduce(payloads, 1).item() == 0
    assert codec.decode_reduce(payloads[[0, 2, 1]], 1).item() == 1
    payloads = torch.stack([comm.codec("int4").encode(torch.randn(700)) for _ in range(3)])
    parts = [comm.codec("int4").decode(payload, 700) for payload in payloads]
    assert torch.equal(comm.codec("int4").decode_reduce(payloads, 700), (parts[0] + parts[1]) + parts[2])
    average = comm.codec("int4").decode_reduce(payloads, 700, torch.bfloat16, average=True)
    assert torch.equal(average, (((parts[0] + parts[1]) + parts[2]) / 3).bfloat16())


@pytest.mark.parametrize("real", [True, False])
def test_what_is_no_payload_is_refused(real: bool) -> None:
    payload = torch.zeros(130, dtype=torch.uint8, device="cpu" if real else "meta")
    with pytest.raises(ValueError, match="130 bytes are not a payload of 129 elements as int8:128:bf16"):
        ops.decode(payload, 129, torch.float32, "int8:128:bf16")
    with pytest.raises(InputError, match="of uint8 is needed"):
        ops.decode(payload.to(torch.int8), 128, torch.float32, "int8:128:bf16")
    with pytest.raises(InputError, match=r"cannot be encoded"):
        ops.encode(payload, "int8:128:bf16")
    with pytest.raises(InputError, match=r"cannot be decoded to torch.int32"):
        ops.decode(payload, 128, torch.int32, "int8:128:bf16")


def assert_compiled_equals_eager(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codec, x = comm.codec(form), hostile(5000 + 77)
    got = []
    for compile_from in (float("inf"), 0):
        monkeypatch.setattr(wire_compiled, "COMPILE_FROM", compile_from)
        monkeypatch.setattr(wire_compiled, "_compiled", {})
        payload = torch.zeros(codec.payload_bytes(len(x)), dtype=torch.uint8)
        encode_into(x, payload, codec, 2**40 + 3, 2**33)
        other = torch.zeros_like(payload)
        encode_into(x.flip(0).contiguous(), other, codec, 5)
        out = torch.empty(len(x))
        decode_reduce_into(torch.stack([payload, other]), out, codec, 2)
        got.append((payload, other, out.view(torch.int32)[~out.isnan()], out.isnan()))
        runs = sum(kernel is not None for kernel in wire_compiled._compiled.values())
        assert runs == (0 if compile_from else 2)
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*got, strict=True))


@pytest.mark.parametrize("form", ["int8:128:bf16"])
def test_compiled_kernels_give_the_bits_of_eager_ones(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_compiled_equals_eager(form, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        "int4:32:bf16", "int6:128:bf16", "int8:32:e8m0", "fp8_e4m3:128:bf16", "int8:128:fp32:stochastic",
        "int4:32:bf16:hadamard", "int8:512:bf16", "int4:10:bf16", "fp8_e4m3:32:e8m0",
    ],
)  # fmt: skip
def test_all_compiled_kernels_give_the_bits_of_eager_ones(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_compiled_equals_eager(form, monkeypatch)


@pytest.mark.parametrize("form", ["int8:128:bf16", "int6:32:fp32:stochastic", "bf16"])
def test_in_a_graph(form: str) -> None:
    """One graph for any size; and the operators' formulas in plain ATen give their bits."""

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        payload = ops.encode(x, form, 3)
        total = ops.decode_reduce(torch.stack([payload, payload]), x.numel(), torch.float32, form, 2)
        return payload, total + ops.decode(payload, x.numel(), torch.float32, form)

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True, dynamic=True)
    for numel in (700, 1300):
        x = hostile(2048)[-numel:]
        for result, expected in zip(compiled(x), both(x), strict=True):
            assert torch.equal(result.nan_to_num(7), expected.nan_to_num(7))
    plain = make_fx(both, FORMULAS, tracing_mode="symbolic")(x)
    targets = {str(node.target) for node in plain.graph.nodes}
    assert not any(target.startswith("qpass") for target in targets)
    for result, expected in zip(plain(x), both(x), strict=True):
        assert torch.equal(result.nan_to_num(7), expected.nan_to_num(7))


def test_without_a_compiler_codecs_run_eagerly_and_say_so() -> None:
    script = """
import logging, torch
logging.basicConfig()
from qpass import comm
x = torch.randn(1 << 17)
codec = comm.codec("int8")
y = codec.decode(codec.encode(x), x.numel())
print(float((y - x).norm() / x.norm()))
"""
    environment = os.environ | {"CXX": "no-such-compiler"}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert 0.004 < float(ran.stdout) < 0.009  # -43.7 dB is 0.0065
    assert ran.stderr.count("no C++ compiler was found") == 2  # once a kernel
