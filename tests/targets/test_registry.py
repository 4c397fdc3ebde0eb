from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import ConfigError
from qpass.patterns import Linear
from qpass.targets import X86, Kernel, Target, for_device, for_graph, get, registry


class Entry:
    """An entry point as importlib.metadata gives it."""

    def __init__(self, value: Any) -> None:
        self.name, self.value, self.loaded = "theirs", "a.package:target", value

    def load(self) -> Any:
        return self.loaded


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes installed packages offer these targets, for one test."""

    def offer(*values: Any) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: [Entry(value) for value in values])
        registry._installed.cache_clear()

    yield offer
    monkeypatch.undo()
    registry._installed.cache_clear()


def test_targets_are_found_by_name_and_by_device(offered: Any) -> None:
    theirs = Target("theirs", "xpu", {})
    offered(theirs)
    assert (get("x86"), get("theirs")) == (X86, theirs)
    assert (for_device("cpu"), for_device("xpu")) == (X86, theirs)
    with pytest.raises(ConfigError) as unknown:
        get("their")
    assert str(unknown.value) == "unknown target 'their' (did you mean 'theirs'?)\n  to do: use one of x86, theirs"


def test_a_given_target_is_known_by_its_name() -> None:
    mine = replace(X86, name="mine")
    assert get(mine) is mine
    assert get("mine") is mine
    with pytest.raises(ConfigError, match="a target named 'x86' is installed already"):
        get(replace(X86))


def test_what_a_package_offers_is_checked(offered: Any) -> None:
    offered("no target")
    with pytest.raises(ConfigError, match=r"the entry point 'theirs' of qpass\.targets is str, not a Target"):
        get("x86")
    offered(Target("x86", "cpu", {}))
    with pytest.raises(ConfigError, match="two targets are named 'x86'"):
        get("x86")


def test_auto_is_the_target_of_the_parameters() -> None:
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    assert for_graph(gm, "auto") is X86
    assert for_graph(torch.fx.symbolic_trace(nn.ReLU()), "auto") is X86
    with pytest.raises(ConfigError, match="the model's parameters are on 'meta', and no target serves that device"):
        for_graph(gm.to("meta"), "auto")
    gm.register_buffer("other", torch.ones(1))
    with pytest.raises(ConfigError, match="the model's parameters are on several kinds of devices: cpu, meta"):
        for_graph(gm, "auto")


def test_kernels_of_ones_own_are_tried_first() -> None:
    class Mine(Kernel):
        name = "mine"

    own = Mine()
    better = X86.with_kernels({Linear: (own,)}, name="better")
    assert better.kernels[Linear] == (own, *X86.kernels[Linear])
    assert {island: kernels for island, kernels in better.kernels.items() if island is not Linear} == {
        island: kernels for island, kernels in X86.kernels.items() if island is not Linear
    }
    prepared = qpass.prepare(nn.Linear(4, 4).eval(), (torch.randn(2, 4),), target=better)
    prepared(torch.randn(2, 4))
    assert qpass.report(qpass.convert(prepared)).target == "better"
