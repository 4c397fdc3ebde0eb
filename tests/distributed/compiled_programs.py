"""What runs on each rank: programs compiled with compressed collectives, held against the same by hand."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from compiled_traffic import ALL, INT8, CompiledTraffic, rounded, value
from qpass import comm
from qpass.errors import AgreementError
from ranks import everywhere


def user_function(rank: int, world: int) -> None:
    """Every kind of collective that Dynamo takes from `torch.distributed`, in one function."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        summed = x @ w
        dist.all_reduce(summed)
        gathered = x.new_empty(world * 6, 50)
        dist.all_gather_into_tensor(gathered, x * 2)
        scattered = x.new_empty(3, 50)
        dist.reduce_scatter_tensor(scattered, x * 3)
        exchanged = torch.empty_like(x)
        dist.all_to_all_single(exchanged, x * 4)
        largest = x * 5
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return summed.relu(), gathered, scattered, exchanged, largest

    x, w = value(rank, 6, 50), value(7, 50, 100)
    with CompiledTraffic() as watch:
        results = torch.compile(function, backend="qpass", options=ALL)(x, w)
    plain = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}
    assert watch.before == [{f"{kind} float32": count for kind, count in plain.items()}]
    assert watch.after == [{"all_reduce float32": 1, "all_gather uint8": 1, "all_to_all uint8": 2}]  # gathers joined
    told = {(record.op, record.outcome, record.reason) for record in watch.decisions}
    assert told == {  # 300 float32 are 3 rows of 130 bytes, in two parts 4; the product's 600 are 5
        ("all_reduce", "lowered", "2,400 -> 650 bytes"),
        ("all_gather", "lowered", "1,200 -> 390 bytes"),
        ("reduce_scatter", "lowered", "1,200 -> 520 bytes"),
        ("all_to_all", "lowered", "1,200 -> 520 bytes"),
        ("all_reduce", "float", "a max cannot be taken over payloads"),
    }
    summed = x @ w
    comm.all_reduce(summed, codec=INT8)
    gathered, scattered, exchanged = x.new_empty(world * 6, 50), x.new_empty(3, 50), torch.empty_like(x)
    comm.all_gather(gathered, x * 2, codec=INT8)
    comm.reduce_scatter(scattered, x * 3, codec=INT8)
    comm.all_to_all(exchanged, x * 4, codec=INT8)
    largest = x * 5
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    for result, expected in zip(results, (summed.relu(), gathered, scattered, exchanged, largest), strict=True):
        assert torch.equal(result, expected)
    reference = rounded(x @ w)  # the sum of two terms does not depend on their order
    dist.all_reduce(reference)
    assert torch.equal(results[0], reference.relu())
    dist.all_gather_into_tensor(gathered, rounded(x * 2))
    assert torch.equal(results[1], gathered)
    for result in (results[0], results[1], results[4]):
        assert all(torch.equal(other, everywhere(result)[0]) for other in everywhere(result))


def in_pieces(rank: int, world: int) -> None:
    """Large tensors go in pieces, the last of them shorter, and none of their bits changes."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        summed, gathered, scattered = x * 2, x.new_empty(world * 10, 77), x.new_empty(5, 77)
        dist.all_reduce(summed)
        dist.all_gather_into_tensor(gathered, x * 3)
        dist.reduce_scatter_tensor(scattered, x * 4)
        return summed, gathered + 1, scattered

    chunk, comm.wire.partition.CHUNK = comm.wire.partition.CHUNK, 128  # so that small tensors, too, go in pieces
    x = value(rank, 10, 77)
    with CompiledTraffic() as watch:
        summed, gathered, scattered = torch.compile(function, backend="qpass", options=ALL)(x)
    comm.wire.partition.CHUNK = chunk
    assert watch.after == [{}]  # 770 elements are 7 rows, each half of them 4
    assert [(record.kernel.rpartition(", ")[2], record.reason) for record in watch.decisions] == [
        ("in 4 pieces", "3,080 -> 910 bytes"), ("in 4 pieces", "3,080 -> 910 bytes"),
        ("in 4 pieces", "3,080 -> 1,040 bytes"),
    ]  # fmt: skip
    expected, parts, part = x * 2, x.new_empty(world * 10, 77), x.new_empty(5, 77)
    comm.all_reduce(expected, codec=INT8)
    comm.all_gather(parts, x * 3, codec=INT8)
    comm.reduce_scatter(part, x * 4, codec=INT8)
    for found, one in ((summed, expected), (gathered, parts + 1), (scattered, part)):
        assert torch.equal(found, one)


def tensor_parallel(rank: int, world: int) -> None:
    """Megatron's two linears: one all_reduce behind the second one."""
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48)).requires_grad_(False)
    x = value(9, 8, 32)
    whole = model(x)
    hidden = nn.functional.gelu(model[0](x)).chunk(world, 1)
    terms = [part @ w.t() for part, w in zip(hidden, model[2].weight.chunk(world, 1), strict=True)]
    bound = sum(INT8.error_bound(term) for term in terms)
    mesh = init_device_mesh("cpu", (world,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    with CompiledTraffic() as watch, torch.no_grad():
        result = torch.compile(model, backend="qpass", options=ALL)(x)
    assert (watch.before, watch.after) == ([{"all_reduce float32": 1}], [{"all_gather uint8": 1}])
    (record,) = watch.decisions
    assert (record.outcome, record.reason) == ("lowered", "1,536 -> 390 bytes")
    error = (result - whole).abs()
    assert (error <= bound + 1e-5).all()  # float32 sums of 64 products of size 1 in another order
    assert error.max() > 1e-5  # it did travel as int8
    assert all(torch.equal(other, everywhere(result)[0]) for other in everywhere(result))


def sharded_training(rank: int, world: int) -> None:
    """A weight gathered in the forward graph, its gradient scattered in the backward one."""

    def loss(x: Tensor, shard: Tensor) -> Tensor:
        w = funcol.all_gather_tensor_autograd(shard, 0, dist.group.WORLD)
        return (x @ w).square().sum()

    x, shard = value(rank, 8, 64), value(rank + 5, 32, 40).requires_grad_()
    with CompiledTraffic() as watch:
        found = torch.compile(loss, backend="qpass", options=ALL)(x, shard)
        found.backward()
    assert watch.before == [{"all_gather float32": 1}, {"reduce_scatter float32": 1}]
    assert watch.after == [{"all_gather uint8": 1}, {"all_to_all uint8": 1}]
    w = x.new_empty(64, 40)
    comm.all_gather(w, shard.detach(), codec=INT8)
    y = x @ w
    torch.testing.assert_close(found, y.square().sum(), rtol=1e-6, atol=0)  # summed in another order
    gradient = torch.empty_like(shard)
    comm.reduce_scatter(gradient, x.t() @ (2 * y), codec=INT8)
    assert torch.equal(shard.grad, gradient)


def ddp_under_compiled_autograd(rank: int, world: int) -> None:
    """The one way in which DDP's gradients are summed in a graph: all of them, in one bucket that Inductor made."""
    torch.manual_seed(0)
    model = nn.Linear(64, 32)
    x = value(rank, 8, 64)
    config = torch._dynamo.config.patch(optimize_ddp="python_reducer", compiled_autograd=True)
    with CompiledTraffic() as watch, config, warnings.catch_warnings(record=True) as warned:
        ddp = nn.parallel.DistributedDataParallel(model)
        torch.compile(lambda: ddp(x).square().sum().backward(), backend="qpass", options=ALL)()
    assert not [str(warning.message) for warning in warned if "collective" in str(warning.message)]
    assert sum(watch.before, Counter()) == {"all_reduce float32": 1}
    assert sum(watch.after, Counter()) == {"all_gather uint8": 1}
    (record,) = watch.decisions
    assert record.reason == "8,320 -> 2,210 bytes"  # 2,080 float32 are 17 rows of 130 bytes
    found = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    y = 2 * model(x).detach()
    expected = torch.cat([(y.t() @ x).flatten(), y.sum(0)]) / world
    bound = INT8.error_bound(expected).float()
    dist.all_reduce(bound)
    dist.all_reduce(expected)
    error = (found - expected).abs()
    assert (error <= bound + 1e-4).all()  # float32 sums of 8 products in another order
    assert error.max() > 1e-4  # it did travel as int8
    assert all(torch.equal(other, everywhere(found)[0]) for other in everywhere(found))


def ranks_that_decide_differently(rank: int, world: int) -> None:
    """Different options are an error on every rank before a byte is sent, at every call; once agreed, none asks again.

    A rank whose backward comes from a cache has its plan before the others, and compares it when they have theirs.
    """
    model = nn.Linear(64, 40, bias=False)

    def loss(x: Tensor) -> Tensor:
        shard = model.weight.view(32, 80) * 2
        return (x @ funcol.all_gather_tensor_autograd(shard, 0, dist.group.WORLD)).square().sum()

    def compiled(policy: comm.Policy) -> Any:
        torch._dynamo.reset()
        return torch.compile(loss, backend="qpass", options={"comm": policy})

    x, same = value(rank, 8, 64), comm.Policy("int8", min_bytes=0)
    different = comm.Policy(("int8", "int4")[rank], min_bytes=0)
    step = compiled(different)
    for _ in range(2):
        with pytest.raises(AgreementError) as raised:
            step(x)
        said = str(raised.value)
        assert "The ranks have compiled different plans" in said
        assert "collective 0: rank 0 has 'all_gather: all_gather of int8:128:bf16: " in said
        assert "rank 1 has 'all_gather: all_gather of int4:32:bf16: " in said
        assert "a policy with join=False is for groups whose ranks run different programs" in said
    late = compiled(same.override((None, "int4")[rank], backward=True))(x)  # the gather is the same on both
    with pytest.raises(AgreementError, match="reduce_scatter: sent plain: override 0 of the policy"):
        late.backward()
    if rank == 0:  # one compiles, the other calls something else
        with pytest.raises(AgreementError, match="rank 0 has 'compiled graph', rank 1 has 'all_reduce'"):
            compiled(comm.Policy("int6", min_bytes=0))(x)
    else:
        with pytest.raises(AgreementError, match="rank 0 has 'compiled graph', rank 1 has 'all_reduce'"):
            comm.all_reduce(torch.ones(10))

    def exchanges(call: Callable[[], Any]) -> int:
        group = comm.eager.group.group_of(None)
        before = group.agreements
        call()
        return group.agreements - before

    step = compiled(same)
    assert exchanges(lambda: step(x).backward()) == 2  # the forward's plan, and the backward's
    assert exchanges(lambda: step(x).backward()) == 0
    wider = value(rank, 9, 64)
    assert exchanges(lambda: step(wider).backward()) == 0  # compiled again, as one rank alone might have to
    comm.debug(True)
    try:
        assert exchanges(lambda: step(x.clone().requires_grad_()).backward()) == 2  # and again
    finally:
        comm.debug(False)
    apart = compiled(replace(same, join=False))
    assert exchanges(lambda: apart(x)) == 0
    with torch._functorch.config.patch(enable_autograd_cache=rank == 0):
        cached = compiled(same)
        counters.clear()
        assert exchanges(lambda: cached(x)) == 1
        late = cached(x)
        assert counters["aot_autograd"]["autograd_cache_hit"] == (rank == 0)
        assert exchanges(late.backward) == 1


def many_ranks(rank: int, world: int) -> None:
    """A sum over all in two shots, and one over a group of some in one, with ranks that are not in that group."""
    comm.eager.schedule.ONE_SHOT_BYTES = 0  # so that small tensors, too, go in two shots
    some = dist.new_group([1, 3])

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x * 2, x * 3
        dist.all_reduce(a)
        if rank in (1, 3):
            dist.all_reduce(b, group=some)
        return a, b

    x = value(rank, 9, 77)
    with CompiledTraffic() as watch:
        a, b = torch.compile(function, backend="qpass", options=ALL)(x)
    inside = rank in (1, 3)
    assert watch.before == [{"all_reduce float32": 1 + inside}]
    assert watch.after == [{"all_to_all uint8": 1, "all_gather uint8": 1 + inside}]
    expected = x * 2
    comm.all_reduce(expected, codec=INT8, schedule="two_shot")
    assert torch.equal(a, expected)
    assert all(torch.equal(other, everywhere(a)[0]) for other in everywhere(a))
    expected = x * 3
    if inside:
        comm.all_reduce(expected, group=some, codec=INT8)
    assert torch.equal(b, expected)
