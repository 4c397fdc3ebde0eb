"""What runs on each rank: compiled programs whose collectives have sizes that change, parts that differ, lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from qpass import comm
from ranks import everywhere
from watched import ALL, INT8, Watch, bytes_sent, rounded, value

HEADERS = 2000
"""Bytes that gloo's headers may take: 48 for each message, of which no program here sends more than 40."""


def check_sent(function: Callable[..., Any], *args: Any, payloads: int) -> Any:
    """What a call returns; it sends that many bytes and the headers of its messages."""
    before = bytes_sent()
    result = function(*args)
    sent = bytes_sent() - before
    assert payloads <= sent <= payloads + HEADERS, (payloads, sent)
    return result


def payload_bytes(*numels: int) -> int:
    return sum(map(INT8.payload_bytes, numels))


def changing_sizes(rank: int, world: int) -> None:
    """Every kind at sizes that are symbolic, forward and backward, in one graph for all of them."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        gathered = funcol.all_gather_tensor_autograd(x @ w, 0, dist.group.WORLD)
        scattered = funcol.reduce_scatter_tensor_autograd(gathered * 2, "sum", 0, dist.group.WORLD)
        exchanged = funcol.all_to_all_single_autograd(x, None, None, dist.group.WORLD)
        summed = funcol.all_reduce(x * 3, "sum", dist.group.WORLD)
        shared = funcol.broadcast(x * 4, 1, dist.group.WORLD)
        return gathered, scattered, exchanged, summed.detach(), shared.detach()

    w = value(9, 70, 90).requires_grad_()
    with Watch() as watch:
        compiled = torch.compile(function, backend="qpass", options=ALL)
        for rows in (20, 26, 34):
            x = value(rank, rows, 70)
            torch._dynamo.mark_dynamic(x, 0)
            w.grad = None
            own, half = rows * 90, payload_bytes(rows // 2 * 70)
            # all_gather, reduce_scatter, all_to_all, all_reduce; rank 1 also sends what it shares
            parts = [own, own, rows * 70] + [rows * 70] * rank
            gathered, scattered, exchanged, summed, shared = check_sent(
                compiled, x, w, payloads=payload_bytes(*parts) + half
            )
            check_sent((scattered.sum() + exchanged.sum()).backward, payloads=2 * payload_bytes(own))
            expected = x.new_empty(world * rows, 90)
            comm.all_gather(expected, (x @ w).detach(), codec=INT8)
            assert torch.equal(gathered, expected)
            part = x.new_empty(rows, 90)
            comm.reduce_scatter(part, expected * 2, codec=INT8)
            assert torch.equal(scattered, part)
            moved = torch.empty_like(x)
            comm.all_to_all(moved, x, codec=INT8)
            assert torch.equal(exchanged, moved)
            total = rounded(x * 3)
            dist.all_reduce(total)
            assert torch.equal(summed, total)
            copy = rounded(x * 4)
            dist.broadcast(copy, 1)
            assert torch.equal(shared, copy)
            ones = x.new_empty(world * rows, 90)
            comm.all_gather(ones, torch.ones(rows, 90), codec=INT8)
            back = x.new_empty(rows, 90)
            comm.reduce_scatter(back, ones * 2, codec=INT8)
            torch.testing.assert_close(w.grad, x.t() @ back, rtol=1e-6, atol=1e-4)  # summed in another order
            assert all(torch.equal(other, everywhere(gathered)[0]) for other in everywhere(gathered))
    kinds = ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "broadcast")
    assert watch.before[:2] == [
        {f"{kind} float32": 1 for kind in kinds},
        {"all_gather float32": 1, "reduce_scatter float32": 1},
    ]
    assert watch.after[:2] == [
        {"all_gather uint8": 2, "all_to_all uint8": 2, "broadcast uint8": 1},
        {"all_gather uint8": 1, "all_to_all uint8": 1},
    ]
    assert len(watch.after) == 2  # the graphs of the first size served all
