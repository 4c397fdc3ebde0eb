"""A list that is waited for at once, as torch 2.15 writes it, is compressed as tensors waited for one by one."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx

import lockstep as send
from lockstep import ops, text, traced, value
from qpass.comm.graph import waits
from qpass.comm.graph.collective import WAIT
from qpass.comm.graph.compress import compress
from qpass.comm.policy.policy import Policy
from qpass.ir.editor import Editor


def summed(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ops.all_reduce_coalesced([x, y], "sum", "0")
    return send.wait(a), send.wait(b)


def wait_for_all(transfers: list[Tensor]) -> list[Tensor]:
    """Stands for the operator in graphs; it is never run."""
    raise AssertionError


def waits_at_once(gm: fx.GraphModule) -> fx.GraphModule:
    """The graph with one wait for all in the place of its waits."""
    edit, single = Editor(gm), gm.graph.find_nodes(op="call_function", target=WAIT)
    vals = [node.meta["val"] for node in single]
    at_once = edit.call(wait_for_all, [node.args[0] for node in single], like=single[0], before=single[0], val=vals)
    for place, node in enumerate(single):
        item = edit.call(operator.getitem, at_once, place, like=node, before=node, val=vals[place])
        node.replace_all_uses_with(item)
        gm.graph.erase_node(node)
    return gm


def test_a_wait_for_a_list_is_a_wait_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "WAIT_FOR_ALL", wait_for_all)
    plain, at_once = traced(summed, value(0, 4, 50), value(0, 128)), traced(summed, value(0, 4, 50), value(0, 128))
    expected = text(plain)
    assert text(waits_at_once(at_once)) != expected
    assert waits.wait_for_each(at_once) == 1
    assert sorted(text(at_once)) == sorted(expected)
    assert waits.wait_for_each(at_once) == 0


def test_a_list_that_is_waited_for_at_once_is_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waits, "WAIT_FOR_ALL", wait_for_all)
    gm = compress(waits_at_once(traced(summed, value(0, 4, 50), value(0, 128))), Policy("int8", min_bytes=0))
    sent = [line for line in text(gm) if "all_" in line and "wait" not in line]
    assert sent == ["all_gather_into_tensor = all_gather_into_tensor(encode, 2, 0)"]
    assert torch.ops._c10d_functional.wait_tensor.default in {node.target for node in gm.graph.nodes}
