"""Meta == real: shape, dtype, strides, device and error, on thousands of random calls; opcheck on hundreds."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_leaves

from qpass.arithmetic.decomposed import OPERATORS, overload
from qpass.errors import InputError
from qpass.ops import quantized_decomposed
from random_calls import Call, calls


def described(result: Any, device: str) -> list[Any]:
    """Shape, dtype and strides of the results; of dimensions without extent strides say nothing."""
    found = []
    for t in tree_leaves(result):
        assert t.device.type == device
        strides = tuple(s for s, size in zip(t.stride(), t.shape, strict=True) if size > 1) if t.numel() else ()
        found.append((tuple(t.shape), t.dtype, strides))
    return found


def outcome(call: Call, device: str) -> list[Any]:
    try:
        return described(overload(call.name, quantized_decomposed)(*call.args, **call.kwargs), device)
    except InputError as error:
        return [str(error)]


def to_meta(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")


def test_meta_and_fake_equal_real() -> None:
    """2,400 calls on meta and 300 on fake tensors, a quarter of them wrong in one way: same results and refusals."""
    refused: Counter[str] = Counter()
    mode = FakeTensorMode()
    for index, call in enumerate(calls(2400, seed=1)):
        real = outcome(call, "cpu")
        assert outcome(call.on(to_meta), "meta") == real, call.about
        if index % 8 == 0:  # each costs as much as ten of the others
            with mode:
                assert outcome(call.on(mode.from_tensor), "cpu") == real, call.about
        if isinstance(real[0], str):
            refused[call.about.split()[1]] += 1
    assert min(refused.values()) > 10
    assert set(refused) == {"count", "axis", "dtype", "bounds", "order", "group"}


def test_layouts_are_kept() -> None:
    """q and dq lay their results out as ``empty_like`` would: dense inputs keep their strides."""
    seen: Counter[str] = Counter()
    for call in calls(1200, seed=2, wrong=0.0):
        if "choose" in call.name:
            continue
        x = call.args[0]
        (result,) = described(overload(call.name, quantized_decomposed)(*call.args, **call.kwargs), "cpu")
        (expected,) = described(torch.empty_like(x), "cpu")
        assert (result[0], result[2]) == (expected[0], expected[2]), call.about
        seen[call.about.split()[4]] += 1
    assert min(seen.values()) > 80
    assert len(seen) == 7


def differentiable(call: Call) -> Call:
    """The same call with its first tensor, if it is a float, and a float scale asking for gradients."""

    def ask(t: Tensor) -> Tensor:
        return t.detach().clone().requires_grad_() if t.dtype in (torch.float32, torch.float64) else t

    return call.on(ask)


CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def check(count: int, seed: int, tests: tuple[str, ...]) -> int:
    done = 0
    for index, call in enumerate(calls(count, seed, wrong=0.0)):
        asked = differentiable(call) if index % 2 else call
        own = (
            tests[1:] if "float8" in call.about else tests
        )  # the schema check compares by isclose, which has no float8
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = opcheck(overload(call.name, quantized_decomposed), asked.args, asked.kwargs, test_utils=own)
        assert set(found.values()) == {"SUCCESS"}, call.about
        done += 1
    return done


def test_opcheck_is_clean() -> None:
    """On 304 cases without the costly last check, and with it on one of every overload."""
    assert check(304, 3, CHECKS[:3]) == 16 * len(OPERATORS)
    assert check(19, 4, CHECKS) == len(OPERATORS)


@pytest.mark.slow
def test_opcheck_is_clean_in_full() -> None:
    assert check(304, 5, CHECKS) == 16 * len(OPERATORS)
