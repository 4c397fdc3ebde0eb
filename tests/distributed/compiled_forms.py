"""What runs on each rank: compiled programs whose collectives have sizes that change, parts that differ, lists."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as funcol

from compiled_traffic import ALL, INT8, CompiledTraffic, check_sent, payload_bytes, rounded, value
from qpass import comm
from qpass.ops import graph_ops
from ranks import everywhere


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
    with CompiledTraffic() as watch:
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


def static_beside_symbolic(rank: int, world: int) -> None:
    """One rank's graph is for any size and the other's for each: they send the same, in pieces and joined."""

    def function(x: Tensor) -> list[Tensor]:
        group = dist.group.WORLD
        found = [funcol.all_reduce(x * 2, "sum", group)]
        found += [funcol.all_gather_tensor(x[:, :columns] * 3, 0, group) for columns in (1, 2)]
        return [each + 1 for each in found]

    with CompiledTraffic() as watch:
        compiled = torch.compile(function, backend="qpass", options=ALL, dynamic=rank == 0)
        for rows in (8300, 8410):  # of 64, which are 2 pieces
            x = value(rank, rows, 64)
            found = compiled(x)
            total = x * 2
            comm.all_reduce(total, codec=INT8)
            expected = [total]
            for part in (x[:, :1] * 3, x[:, :2] * 3):
                expected.append(part.new_empty(world * len(part), part.shape[1]))
                comm.all_gather(expected[-1], part, codec=INT8)
            for result, reference in zip(found, expected, strict=True):
                assert torch.equal(result, reference + 1)
            assert len({bytes(other.numpy()) for other in everywhere(found[0])}) == 1
    assert len(watch.after) == (2 if rank else 1)
    told = {record.kernel.partition(", ")[2] for record in watch.decisions}
    assert told == {"summed, in 2 pieces", "joined with 1 other"}


def mixture_of_experts(rank: int, world: int) -> None:
    """Tokens go to their experts and back: how many to each is in the data, and differs by rank and by step."""

    def moe(x: Tensor, router: Tensor, expert: Tensor, exchange: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        chosen = (x @ router).argmax(1)  # a rank for each token
        order = chosen.argsort(stable=True)
        counts = torch.bincount(chosen, minlength=world)[:world]
        theirs = funcol.all_to_all_single(counts, None, None, dist.group.WORLD)
        sent, received = counts.tolist(), theirs.tolist()
        for count in (*sent, *received):
            torch._check(count >= 0)
        arrived = exchange(x[order], received, sent)
        returned = exchange(arrived @ expert, sent, received)
        return torch.zeros_like(returned).index_copy(0, order, returned), arrived

    def plain(x: Tensor, out: list[int], into: list[int]) -> Tensor:
        return funcol.all_to_all_single_autograd(x, out, into, dist.group.WORLD)

    def by_hand(x: Tensor, out: list[int], into: list[int]) -> Tensor:
        call = {"self": x, "output_split_sizes": out, "input_split_sizes": into, "group": dist.group.WORLD}
        return comm.eager.functional.all_to_all(call, INT8)

    router, expert = value(7, 128, world), value(8 + rank, 128, 100).requires_grad_()
    with CompiledTraffic() as watch, torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(moe, backend="qpass", options=ALL, fullgraph=True)
        for step in range(3):
            x = value(10 * step + rank, 40, 128).requires_grad_()
            if step == 2:  # every token goes to rank 0
                router = torch.zeros_like(router)
            other = int(((x @ router).argmax(1) == 1 - rank).sum())
            everyone = [int(n) for n in everywhere(torch.tensor([other]))[1 - rank].view(torch.int64)]
            out = payload_bytes(other * 128, everyone[0] * 100)
            found, arrived = check_sent(compiled, x, router, expert, plain, payloads=out + 8 * world)
            check_sent((found.square().sum() / 100).backward, payloads=payload_bytes(other * 100, everyone[0] * 128))
            gradients = [x.grad, expert.grad]
            x.grad = expert.grad = None
            expected, reference = moe(x, router, expert, by_hand)
            (expected.square().sum() / 100).backward()
            assert torch.equal(arrived, reference)
            torch.testing.assert_close(found, expected)
            for gradient, by in zip(gradients, [x.grad, expert.grad], strict=True):
                torch.testing.assert_close(gradient, by)
            expert.grad = None
    assert watch.before[:2] == [
        {"all_to_all int64": 1, "all_to_all float32": 2},
        {"all_to_all float32": 2},
    ]
    assert watch.after[:2] == [{"all_to_all int64": 1, "all_to_all uint8": 2}, {"all_to_all uint8": 2}]
    assert len(watch.after) == 2
    assert [record.outcome for record in watch.decisions] == ["float", *["lowered"] * 4]


def lists_of_tensors(rank: int, world: int) -> None:
    """Coalesced collectives, each of which becomes one transfer."""

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        group = dist.group.WORLD
        summed = funcol.all_reduce_coalesced([x * 2, y * 3], "sum", group)
        gathered = funcol.all_gather_into_tensor_coalesced([x * 4, y * 5], group)
        scattered = funcol.reduce_scatter_tensor_coalesced([x * 6, y * 7], "avg", [0, 0], group)
        return [tensor + 1 for tensor in (*summed, *gathered, *scattered)]

    x, y = value(rank, 6, 50), value(rank + 5, 4, 700)
    with CompiledTraffic() as watch:
        compiled = torch.compile(function, backend="qpass", options=ALL)
        compiled(x, y)
        # x is 3 rows and its halves are 2; y is 22 rows and its halves are 11
        results = check_sent(compiled, x, y, payloads=(25 + 25 + 13) * 130)
    assert watch.before == [
        {"all_reduce_coalesced": 1, "all_gather_into_tensor_coalesced": 1, "reduce_scatter_tensor_coalesced": 1}
    ]
    assert watch.after == [{"all_gather uint8": 1, "all_to_all uint8": 1}]  # the sum's joins the other
    expected = [rounded(x * 2), rounded(y * 3)]
    for tensor in expected:
        dist.all_reduce(tensor)
    for tensor in (x * 4, y * 5):
        expected.append(tensor.new_empty(world * len(tensor), tensor.shape[1]))
        comm.all_gather(expected[-1], tensor, codec=INT8)
    for tensor in (x * 6, y * 7):
        expected.append(tensor.new_empty(len(tensor) // world, tensor.shape[1]))
        comm.reduce_scatter(expected[-1], tensor, op=dist.ReduceOp.AVG, codec=INT8)
    for result, reference in zip(results, expected, strict=True):
        assert torch.equal(result, reference + 1)


def outputs(rank: int, world: int) -> None:
    """Functional collectives that the user has write into a new tensor and into an input, and reads there."""
    name = dist.distributed_c10d._get_default_group().group_name
    c10d = torch.ops._c10d_functional

    def function(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        whole = x.new_empty(world * 6, 50)
        c10d.wait_tensor(c10d.all_gather_into_tensor_out(x * 2, world, name, out=whole))
        c10d.wait_tensor(c10d.reduce_scatter_tensor_out(x * 3, "sum", world, name, out=kept))
        return whole, kept + 1

    x, kept = value(rank, 6, 50), torch.zeros(3, 50)
    with CompiledTraffic() as watch:
        compiled = torch.compile(function, backend="qpass", options=ALL)
        compiled(x, kept)
        whole, more = check_sent(compiled, x, kept, payloads=payload_bytes(300, 150))
    assert watch.before == [{"all_gather_into_tensor_out": 1, "reduce_scatter_tensor_out": 1}]
    assert watch.after == [{"all_gather uint8": 1, "all_to_all uint8": 1}]
    gathered, scattered = x.new_empty(world * 6, 50), x.new_empty(3, 50)
    comm.all_gather(gathered, x * 2, codec=INT8)
    comm.reduce_scatter(scattered, x * 3, codec=INT8)
    assert torch.equal(whole, gathered)
    assert torch.equal(kept, scattered)
    assert torch.equal(more, scattered + 1)


def quantized_values(rank: int, world: int) -> None:
    """Values that somebody quantized travel as their codes, without being asked to."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        largest = x.abs().amax()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        scale, zero = largest / 127, torch.zeros((), dtype=torch.int64)
        gathered = funcol.all_gather_tensor(x, 0, dist.group.WORLD)
        codes = graph_ops.quantize_per_tensor.tensor(gathered, scale, zero, -127, 127, torch.int8)
        rounded_w = graph_ops.quantize_per_tensor.default(w, 0.01 * (rank + 1), rank, -127, 127, torch.int8)
        own = graph_ops.dequantize_per_tensor.default(rounded_w, 0.01 * (rank + 1), rank, -127, 127, torch.int8)
        everyones = funcol.all_gather_tensor(own, 0, dist.group.WORLD)
        return graph_ops.dequantize_per_tensor.tensor(codes, scale, zero, -127, 127, torch.int8), everyones * 2

    x, w = value(rank, 40, 100), value(rank + 5, 30, 70)
    expected = function(x, w)
    compiled = torch.compile(function, backend="qpass")
    compiled(x, w)
    found = check_sent(compiled, x, w, payloads=40 * 100 + 30 * 70 + 4 + 4 + 8)
    for result, reference in zip(found, expected, strict=True):
        assert torch.equal(result, reference)
