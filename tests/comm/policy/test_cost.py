"""The cost model: its formulas against counts done by hand, its break-even against a search, its words."""

from __future__ import annotations

import math

import pytest
import torch

import qpass.comm
from qpass.comm.policy.cost import FORMS, GAIN, Link, break_even, decide, seconds, symbols
from qpass.errors import ConfigError

INT8 = qpass.comm.codec("int8")
GIGABIT = Link(bandwidth=125e6, latency=1e-4, encode=5e9, decode=8e9, overhead=1e-3)
MIB = 1 << 20


def at(collective: str, **values: float) -> tuple[float, float]:
    """Plain and compressed seconds; what is not given costs nothing."""
    free = {"n": 1, "W": 2, "b": 4, "p": 1, "B": math.inf, "L": 0, "E": math.inf, "D": math.inf, "F": 0} | values
    named = {symbols()[name]: value for name, value in free.items()}
    plain, compressed = (float(expression.subs(named)) for expression in seconds(collective))
    return plain, compressed


# By hand, for 8 ranks and 800 elements of 4 bytes that become 1: bytes a rank sends, elements it encodes and decodes.
@pytest.mark.parametrize(
    ("collective", "sent", "encoded", "decoded"),
    [
        ("all_reduce", 2 * 7 * 100 * 4, 900, 1600),  # encodes all and its sum; decodes 8 parts of 100, and 800
        ("reduce_scatter", 7 * 100 * 4, 800, 800),
        ("all_gather", 7 * 100 * 4, 100, 800),
        ("all_to_all", 7 * 100 * 4, 800, 800),
        ("broadcast", 800 * 4, 800, 800),
    ],
)
def test_what_is_counted(collective: str, sent: int, encoded: int, decoded: int) -> None:
    size = {"W": 8, "n": 800}
    assert at(collective, **size, B=1.0) == pytest.approx((sent, sent / 4))
    assert at(collective, **size, E=4.0) == pytest.approx((0, encoded))
    assert at(collective, **size, D=4.0) == pytest.approx((0, decoded))
    assert at(collective, **size, F=3.0) == pytest.approx((0, 3))


@pytest.mark.parametrize(("collective", "plain", "compressed"), [("all_reduce", 6, 2), ("all_to_all", 1, 1)])
def test_messages_that_follow_each_other(collective: str, plain: int, compressed: int) -> None:
    assert at(collective, W=8, L=1.0) == (plain, compressed)


@pytest.mark.parametrize("collective", FORMS)
@pytest.mark.parametrize("world", [2, 3, 8])
def test_break_even_is_where_the_decision_turns(collective: str, world: int) -> None:
    least = decide(collective, 1 << 30, torch.float32, world, INT8, GIGABIT).break_even
    assert least is not None
    assert 1000 < least < 1 << 20  # 1 ms of overhead buys 125 kB of a gigabit
    assert not decide(collective, int(least * 0.98), torch.float32, world, INT8, GIGABIT)
    assert decide(collective, int(least * 1.02) + 128, torch.float32, world, INT8, GIGABIT)


def test_the_break_even_size_is_one_formula() -> None:
    size = break_even("all_reduce")
    assert size.free_symbols <= set(symbols().values())
    assert symbols()["n"] not in size.free_symbols


def test_a_gigabit_all_reduce_of_64_mib() -> None:
    """Ideal fp32: 64 MiB at 125 MB/s, 537 ms. int8: 1.016 bytes an element, 136 ms, and the codec's 30 ms."""
    decision = decide("all_reduce", 16 * MIB, torch.float32, 2, INT8, GIGABIT)
    assert decision.plain == pytest.approx(0.537, rel=0.01)
    assert decision.compressed == pytest.approx(0.136 + 16 * MIB * 4 * (1.5 / 5e9 + 2 / 8e9) + 0.0012, rel=0.01)
    assert str(decision) == decision.reason
    assert "16,777,216 float32 over 2 ranks is sent as int8:128:bf16: 174 ms compressed, 537 ms plain" in str(decision)


def test_a_link_as_fast_as_the_codec_is_declined() -> None:
    fast = Link(bandwidth=10e9, latency=1e-5, encode=5e9, decode=8e9)
    decision = decide("all_reduce", 16 * MIB, torch.float32, 2, INT8, fast)
    assert not decision
    assert decision.break_even is None
    assert "is sent plain" in decision.reason
    assert "never pays on this link" in decision.reason


def test_the_threshold_of_bandwidth() -> None:
    """Compression pays up to the link speed at which GAIN of the bytes' time is the codec's: found by bisection."""
    low, high = 1e6, 1e12
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        pays = decide("all_reduce", 1 << 28, torch.float32, 8, INT8, Link(middle, 0, 5e9, 5e9))
        low, high = (middle, high) if pays else (low, middle)
    per_element = 4 * (9 / 8 + 2) / 5e9  # seconds of coding
    assert low == pytest.approx(2 * 7 / 8 * (GAIN * 4 - 130 / 128) / per_element, rel=0.01)


@pytest.mark.parametrize(
    ("dtype", "codec", "world", "numel", "words"),
    [
        (torch.int64, "int8", 2, MIB, "all_reduce of int64 is never compressed"),
        (torch.complex64, "int8", 2, MIB, "all_reduce of complex64 is never compressed"),
        (torch.bfloat16, "bf16", 2, MIB, "no fewer than the 2 of bfloat16"),
        (torch.float32, "int8", 1, MIB, "sends nothing"),
        (torch.float32, "int8", 2, 0, "sends nothing"),
        (torch.float32, "int8", 2, 16, "8.12 bytes an element, no fewer than the 4 of float32"),
    ],
)
def test_what_is_never_compressed(dtype: torch.dtype, codec: str, world: int, numel: int, words: str) -> None:
    decision = decide("all_reduce", numel, dtype, world, qpass.comm.codec(codec), GIGABIT)
    assert not decision
    assert words in decision.reason


def test_errors() -> None:
    with pytest.raises(ConfigError, match=r"'all_reduc'.*did you mean 'all_reduce'"):
        decide("all_reduc", 1, torch.float32, 2, INT8, GIGABIT)
    with pytest.raises(ConfigError, match="bandwidth must be positive"):
        Link(0.0, 0.0, 1.0, 1.0)
    with pytest.raises(ConfigError, match="latency must be at least 0"):
        Link(1.0, -1.0, 1.0, 1.0)


def test_a_payload_that_saves_no_more_than_the_margin_has_no_break_even() -> None:
    """40 float16 are 80 bytes, and 72 as int4: nine tenths, which is what it may take. The two lines are parallel."""
    codec = qpass.comm.codec("int4")
    assert codec.payload_bytes(40) == 72
    decision = decide("all_gather", 40, torch.float16, 2, codec, Link(1.0, 0.0, 1e30, 1e30))
    assert math.isclose(decision.compressed, GAIN * decision.plain)
    assert ("pays at any size" if decision else "never pays") in decision.reason
