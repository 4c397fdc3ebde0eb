"""The examples of compiled collectives, on two ranks: they send a quarter of the bytes, and compute the same."""

from __future__ import annotations

import re

import pytest
import torch

from torchrun import torchrun

NUMBER = r" +([+-]?[\d.]+(?:e-?\d+)?)(?: %)?"


def figures(printed: str, name: str, count: int) -> list[float]:
    """The ``count`` numbers that stand behind ``name`` in a table."""
    found = re.search(f"^{name}{NUMBER * count}$", printed, re.MULTILINE)
    assert found is not None
    return [float(number) for number in found.groups()]


def test_tensor_parallel() -> None:
    """Two sums of 4 x 128 rows of 128 float32 are 524 kB; every rank sends its terms once to the other."""
    printed = torchrun("tensor_parallel", "--width", "128", "--blocks", "1", "--rounds", "2", "--codecs", "int8")
    plain, int8 = (figures(printed, name, 3) for name in ("inductor", "qpass int8"))
    assert plain[0] < 1e-6  # float32, summed in another order
    assert 1e-4 < int8[0] < 5e-3  # terms are rounded by 1 / 254 of the largest of their block at most
    assert plain[1] == pytest.approx(0.524, rel=0.02)
    assert int8[1] == pytest.approx(0.524 * 8.125 / 32, rel=0.02)
    assert "collectives 2 of 2 compressed" in printed
    assert "0.down  forward  all_reduce  all_gather of int8:128:bf16, summed  262,144 -> 66,560 bytes" in printed


def test_simple_fsdp() -> None:
    printed = torchrun("train_simple_fsdp", "--steps", "3", "--layers", "1")
    plain, int8 = (figures(printed, name, 5) for name in ("inductor", "qpass int8"))
    assert 4.8 < plain[0] < 5.1  # of 128 signs, nothing known: ln 128 = 4.85
    assert int8[0] == plain[0]
    assert plain[1] < plain[0] - 0.5
    assert abs(int8[2]) < 2
    # Three weights of 18 parameters, gathered and scattered. torch 2.15 gathers the packed weight and bias of attention
    # twice, one of them in a form that is sent plain.
    expected = "6 of 36" if torch.__version__ < (2, 15) else "6 of 38"
    assert f"collectives {expected} compressed" in printed


@pytest.mark.slow  # 600 steps
def test_300_steps_of_simple_fsdp_end_where_inductor_ends() -> None:
    printed = torchrun("train_simple_fsdp")
    plain, int8 = (figures(printed, name, 5) for name in ("inductor", "qpass int8"))
    assert plain[1] < 2.3  # it has learnt: a model of single letters ends near 3.2
    assert abs(int8[2]) < 0.5
    assert int8[3] < plain[3] / 2  # small parameters travel as they are
