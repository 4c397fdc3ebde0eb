"""One compiled graph serves many blocks: each computes with what *it* holds at that moment, however it came there."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from live_blocks import CHANGES, LEAST, ROWS, SHOWS, WIDTH, Block, decibels, fill, replace

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


@torch.no_grad()
def test_a_new_bias_packs_no_weight_again(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [Block() for _ in range(2)]
    compiled = [torch.compile(block, backend="qpass") for block in blocks]
    x = torch.randn(ROWS, WIDTH)
    check(blocks, compiled, x, "compiled")
    replace(blocks[0].k, "bias")  # half of a constant that is joined of two; the old one is freed
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.onednn, "qlinear_prepack", never)
        check(blocks, compiled, x, "a bias replaced")


def never(*_: Any) -> Any:
    raise AssertionError("packed again, though no weight changed")


@torch.no_grad()
@pytest.mark.parametrize("frozen", [False, True], ids=["", "frozen"])
def test_blocks_that_are_gone_are_freed(frozen: bool) -> None:
    x, kept = torch.randn(ROWS, WIDTH), []
    for _ in range(3):
        block = Block().requires_grad_(not frozen)
        torch.compile(block, backend="qpass")(x)
        kept += [weakref.ref(parameter) for parameter in block.parameters()]
        del block
        gc.collect()
    assert [reference for reference in kept if reference() is not None] == []


class Kind(nn.Module):
    """A kind of block, drawn by chance."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        chance = random.Random(seed)
        norms = {"layer": nn.LayerNorm, "rms": nn.RMSNorm, "batch": nn.BatchNorm1d}
        self.norm = norms[chance.choice(sorted(norms))](WIDTH)
        self.layers = nn.ModuleList(
            nn.Linear(WIDTH, WIDTH, bias=chance.random() < 0.7) for _ in range(chance.randint(1, 3))
        )
        self.tied = chance.random() < 0.3
        if self.tied:
            self.layers[-1].weight = self.layers[0].weight
        self.shift = nn.Parameter(torch.empty(WIDTH), requires_grad=chance.random() < 0.5)
        self.register_buffer("gate", torch.empty(ROWS, 1))
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(self.norm(x)) + self.shift
        return x * self.gate


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n > 1 else []) for n in range(40)])
@torch.no_grad()
def test_kinds_of_blocks_and_changes_drawn_by_chance(seed: int) -> None:
    chance = random.Random(seed)
    blocks = [Kind(seed) for _ in range(chance.randint(2, 4))]
    for block in blocks:
        fill(block)
    compiled = [torch.compile(block, backend="qpass") for block in blocks]
    x = torch.randn(ROWS, WIDTH)
    for _ in range(30):
        check(blocks, compiled, x, f"seed {seed}")
        block = chance.choice(blocks)
        path, value = chance.choice([*block.named_parameters(), *block.named_buffers()])
        owner, _, name = path.rpartition(".")
        ways = (
            lambda value=value: value.copy_(other_value(value)),
            lambda value=value: setattr(value, "data", other_value(value)),
            lambda block=block, owner=owner, name=name: replace(block.get_submodule(owner), name),
        )
        if value.dtype.is_floating_point:
            chance.choice(ways)()


def other_value(like: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(like) + 0.5  # a variance, too
