"""One compiled graph serves many blocks: each computes with what *it* holds at that moment, however it came there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qpass
from live_blocks import CHANGES, LEAST, ROWS, SHOWS, WIDTH, Block, decibels

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
@pytest.mark.parametrize("preset", ["int8_dynamic", "int8_weight_only"])
def test_blocks_that_share_a_graph(preset: str, frozen: bool, mode: str) -> None:
    torch._dynamo.utils.counters.clear()
    blocks = [Block().requires_grad_(not frozen) for _ in range(3)]
    compiled = [torch.compile(block, backend=qpass.backend(preset)) for block in blocks]
    x = torch.randn(ROWS, WIDTH)
    with MODES[mode]():
        check(blocks, compiled, x, "compiled")
    for number, (how, change) in enumerate(CHANGES.items()):
        changed = blocks[number % 3]
        with torch.no_grad():
            before = changed(x)
            change(changed)
            assert decibels(changed(x), before) < SHOWS, f"{how}: changes too little to show"
        with MODES[mode]():
            check(blocks, compiled, x, how)
    assert graphs() == 1


def check(blocks: list[Any], compiled: list[Callable[..., Any]], x: Any, how: str) -> None:
    found = [decibels(block(x), call(x)) for block, call in zip(blocks, compiled, strict=True)]
    assert min(found) > LEAST, f"{how}: {found} dB"
