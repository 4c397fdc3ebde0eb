"""Weights that change after compilation: noticed, packed again, never mixed up, never compiled again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear_backend import Backend, Net, assert_equal, assert_same, qlinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")


UPDATES: dict[str, Callable[[Net], Any]] = {
    "in place": lambda net: net.a.weight.mul_(-2),
    "in place, fewer than 9 elements": lambda net: net.b.bias.add_(3),
    "data replaced": lambda net: setattr(net.a.weight, "data", torch.randn(16, 32)),
    "data swapped": lambda net: swap_data(net.a.weight, torch.randn(16, 32)),
    "data written": lambda net: net.a.weight.data.copy_(torch.randn(16, 32)),
    "written through numpy": lambda net: net.a.weight.numpy().__setitem__(slice(None), 0.5),
    "parameter replaced": lambda net: setattr(net.a, "weight", nn.Parameter(torch.randn(16, 32))),
    "loaded": lambda net: net.load_state_dict({k: torch.randn_like(v) for k, v in net.state_dict().items()}),
    "loaded by assignment": lambda net: net.load_state_dict(
        {k: torch.randn_like(v) for k, v in net.state_dict().items()}, assign=True
    ),
    "float parameters": lambda net: (net.norm.weight.mul_(3), net.norm.bias.data.fill_(0.25)),
}


def swap_data(weight: Tensor, other: Tensor) -> None:
    weight.data, other.data = other.data, weight.data  # the old storage lives on: no free gives the change away
    KEPT.append(other)


KEPT: list[Tensor] = []


@torch.no_grad()
def test_every_way_to_change_a_weight_is_noticed_without_compiling_again() -> None:
    backend, net = Backend(), Net()
    compiled = torch.compile(net, backend=backend)
    x = torch.randn(8, 32)
    compiled(x)
    for how, update in UPDATES.items():
        before = net.expected(x)
        update(net)
        assert not torch.allclose(before, net.expected(x), atol=0.2), how
        assert_same(compiled(x), net.expected(x))
    assert backend.compilations == 1


def test_inference_mode_weights_have_no_version_and_are_still_noticed() -> None:
    backend = Backend()
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(32, 16))
        compiled = torch.compile(net, backend=backend)
        x = torch.randn(4, 32)
        assert_equal(compiled(x), qlinear(x, net[0]))
        net[0].weight[3, 5] += 7
        assert_equal(compiled(x), qlinear(x, net[0]))
    assert backend.compilations == 1


@torch.no_grad()
def test_layers_that_share_a_graph_keep_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Backend()
    layers = [nn.Sequential(nn.Linear(32, 32)) for _ in range(4)]
    compiled = [torch.compile(layer, backend=backend) for layer in layers]
    x = torch.randn(4, 32)
    outputs = [call(x) for call in compiled]
    with monkeypatch.context() as patch:
        patch.setattr(torch.ops.onednn, "qlinear_prepack", never)
        for _ in range(3):
            for call, output in zip(compiled, outputs, strict=True):
                assert_equal(call(x), output)
    for layer, output in zip(layers, outputs, strict=True):
        assert_equal(output, qlinear(x, layer[0]))
    assert backend.compilations == 1


def never(*_: Any) -> Tensor:
    raise AssertionError("packed again, though no weight changed")


@torch.no_grad()
def test_threads_with_different_weights_do_not_mix_them() -> None:
    layers = [nn.Sequential(nn.Linear(64, 64)) for _ in range(3)]
    backend = Backend()
    compiled = [torch.compile(layer, backend=backend) for layer in layers]
    x = torch.randn(32, 64)
    expected = [call(x) for call in compiled]
    wrong: list[int] = []

    def work(index: int) -> None:
        with torch.no_grad():
            for _ in range(100):
                if not torch.equal(compiled[index](x), expected[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(n % 3,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert backend.compilations == 1
    assert not wrong
