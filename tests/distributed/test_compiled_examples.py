"""The examples of compiled collectives, on two ranks: they send a quarter of the bytes, and compute the same."""

from __future__ import annotations

import re

import pytest

from distributed.torchrun import torchrun

NUMBER = r" +([+-]?[\d.]+(?:e-?\d+)?)(?: %)?"


def figures(printed: str, name: str, count: int) -> list[float]:
    """The ``count`` numbers that stand behind ``name`` in a table."""
    found = re.search(f"^{name}{NUMBER * count}$", printed, re.MULTILINE)
    assert found is not None
    return [float(number) for number in found.groups()]


def test_tensor_parallel() -> None:
    """Two sums of 4 x 128 rows of 128 float32 are 524 kB; every rank sends its terms once to the other."""
    printed = torchrun("tensor_parallel", "--width", "128", "--blocks", "1", "--rounds", "2")
    plain, int8, int4 = (figures(printed, name, 3) for name in ("inductor", "qpass int8", "qpass int4"))
    assert plain[0] < 1e-6  # float32, summed in another order
    assert 1e-4 < int8[0] < 5e-3  # of 8 bits: terms are rounded to 1 / 254 of their block's largest value at most
    assert 5 * int8[0] < int4[0] < 0.1  # of 4 bits: 127 / 7 = 18 times as coarse
    for (_, megabytes, _), bits in ((plain, 32), (int8, 8.125), (int4, 4.5)):
        assert megabytes == pytest.approx(4 * 128 * 128 * 2 * bits / 8e6, rel=0.02)
    assert "collectives 2 of 2 compressed" in printed
    assert "262,144 -> 36,864 bytes" in printed


def test_simple_fsdp() -> None:
    printed = torchrun("train_simple_fsdp", "--steps", "3", "--layers", "1")
    plain, int8 = (figures(printed, name, 5) for name in ("inductor", "qpass int8"))
    assert 4.8 < plain[0] < 5.1  # of 128 signs, nothing known: ln 128 = 4.85
    assert int8[0] == plain[0]
    assert plain[1] < plain[0] - 0.5
    assert abs(int8[2]) < 2
    assert "collectives 6 of" in printed


@pytest.mark.slow  # 600 steps
def test_300_steps_of_simple_fsdp_end_where_inductor_ends() -> None:
    printed = torchrun("train_simple_fsdp")
    plain, int8 = (figures(printed, name, 5) for name in ("inductor", "qpass int8"))
    assert plain[1] < 2.3  # it has learnt: a model of single letters ends near 3.2
    assert abs(int8[2]) < 0.5
    assert int8[3] < plain[3] / 2  # small parameters travel as they are
