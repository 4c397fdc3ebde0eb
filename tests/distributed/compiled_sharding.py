"""What runs on each rank: models whose weights are DTensors, gathered by a parametrization, compiled as a whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.utils import parametrize

from compiled_traffic import ALL, HEADERS, INT8, CompiledTraffic, check_sent, payload_bytes, value
from qpass import comm
from ranks import everywhere

Whole = Callable[[Tensor], Tensor]


class Gathered(nn.Module):
    """A shard -> the weight that the rank computes with; the gradient is averaged over the ranks and scattered back.

    ``wanted`` are the placements of the weight, ``dtype`` what it is cast to once it is there.
    """

    def __init__(self, wanted: list[Placement], gradient: list[Placement], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.wanted, self.gradient, self.dtype = wanted, gradient, dtype

    def forward(self, shard: DTensor) -> Tensor:
        whole = shard.redistribute(placements=self.wanted).to_local(grad_placements=self.gradient)
        return whole if self.dtype is None else whole.to(self.dtype)


def shard_weights(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype | None = None) -> None:
    """Each rank keeps a part of the first dimension of every weight, and gathers the whole where it is read."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Shard(0)]))
            rule = Gathered([Replicate()], [Partial("avg")], dtype)
            parametrize.register_parametrization(module, "weight", rule, unsafe=True)


def shards_of(model: nn.Module) -> list[Tensor]:
    return [parameter.to_local() for parameter in model.parameters()]  # type: ignore[attr-defined]


def by_hand(shards: list[Tensor], x: Tensor, dtype: torch.dtype, codec: comm.Codec) -> tuple[Tensor, list[Tensor]]:
    """The loss of two linears with a relu between, and the parts of its gradient, by the collectives of qpass.comm."""
    world, whole = dist.get_world_size(), []
    for shard in shards:
        weight = torch.empty(world * len(shard), shard.shape[1], dtype=dtype)
        comm.all_gather(weight, shard.detach().to(dtype), codec=codec)
        whole.append(weight.requires_grad_())
    first, second = whole
    loss = F.linear(F.linear(x.to(dtype), first).relu(), second).float().square().mean()
    loss.backward()
    gradients = []
    for shard, weight in zip(shards, whole, strict=True):
        gradient = torch.empty_like(shard)
        assert weight.grad is not None
        comm.reduce_scatter(gradient, weight.grad.to(shard.dtype), op=dist.ReduceOp.AVG, codec=codec)
        gradients.append(gradient)
    return loss.detach(), gradients


def simple_fsdp(rank: int, world: int) -> None:
    """Weights gathered forward, which are cast to bfloat16 then, and gradients scattered backward."""
    train(rank, world, torch.bfloat16, ["6,144 -> 3,120 bytes", "3,072 -> 1,560 bytes"])


def simple_fsdp_in_float32(rank: int, world: int) -> None:
    """The same without the cast."""
    train(rank, world, torch.float32, ["12,288 -> 3,120 bytes", "6,144 -> 1,560 bytes"])


def train(rank: int, world: int, dtype: torch.dtype, told: list[str]) -> None:
    """Three steps; ``told`` is what the report says of the forward graph's collectives."""
    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
    shard_weights(model, mesh, None if dtype is torch.float32 else dtype)

    def loss(x: Tensor) -> Tensor:
        return model(x.to(dtype)).float().square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sizes = [48 * 64, 16 * 96]  # the shards of each rank, of which the other gets as much as it keeps
    with CompiledTraffic() as watch:
        compiled = torch.compile(loss, backend="qpass", options=ALL, fullgraph=True)
        for step in range(3):
            x = value(10 * step + rank, 16, 64)
            found = check_sent(compiled, x, payloads=payload_bytes(*sizes))
            check_sent(found.backward, payloads=payload_bytes(*sizes))
            expected, gradients = by_hand(shards_of(model), x, dtype, INT8)
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # a mean in another order
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                assert isinstance(parameter.grad, DTensor)
                own = parameter.grad.to_local()
                # equal but where a sum of the backward pass, taken in another order, falls on another code
                step_size = INT8.error_bound(gradient)
                assert ((own - gradient).abs() <= 2 * step_size + 1e-6).all()
                assert (own == gradient).float().mean() > 0.95
            optimizer.step()
            optimizer.zero_grad()
    assert watch.before == [{"all_gather float32": 2}, {"reduce_scatter float32": 2}]
    assert watch.after == [{"all_gather uint8": 1}, {"all_to_all uint8": 1}]  # both weights at once
    assert sorted(record.reason for record in watch.decisions[:2]) == sorted(told)


def joined(rank: int, world: int) -> None:
    """Small weights are gathered at once, and their gradients scattered at once: the bits and the bytes stay."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for rows, columns in ((96, 64), (80, 96), (64, 80), (32, 64)):
        layers += [nn.Linear(columns, rows, bias=False), nn.ReLU()]
    model = nn.Sequential(*layers)
    shard_weights(model, init_device_mesh("cpu", (world,)))
    sizes = [shard.numel() for shard in shards_of(model)]
    x, results = value(rank, 16, 64), []
    for join, count in ((False, 4), (True, 1)):
        torch._dynamo.reset()
        policy = comm.Policy("int8", min_bytes=0, join=join)
        with CompiledTraffic() as watch:
            compiled = torch.compile(
                lambda x: model(x).square().mean(), backend="qpass", options={"comm": policy}, fullgraph=True
            )
            compiled(x).backward()
            model.zero_grad()
            payloads = (world - 1) * payload_bytes(*sizes)
            headers = HEADERS * world // 2  # apart it takes a rank of four 72 messages
            loss = check_sent(compiled, x, payloads=payloads, headers=headers)
            check_sent(loss.backward, payloads=payloads, headers=headers)
        assert watch.before == [{"all_gather float32": 4}, {"reduce_scatter float32": 4}]
        assert watch.after == [{"all_gather uint8": count}, {"all_to_all uint8": count}]
        assert [record.kernel.endswith(", joined with 3 others") for record in watch.decisions] == [join] * 8
        results.append([loss.detach(), *(parameter.grad.to_local() for parameter in model.parameters())])  # type: ignore[union-attr]  # it has run backward
        model.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def cast_to_float8(rank: int, world: int) -> None:
    """Weights that are cast to eight bits once they are gathered travel as eight bits: exact, whatever the policy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.ReLU(), nn.Linear(96, 32, bias=False))
    plain = [module.weight.detach().to(torch.float8_e4m3fn).float() for module in (model[0], model[2])]
    shard_weights(model, init_device_mesh("cpu", (world,)), torch.float8_e4m3fn)

    def function(x: Tensor) -> Tensor:
        hidden = F.linear(x, model[0].weight.float()).relu()
        return F.linear(hidden, model[2].weight.float())

    x = value(rank, 16, 64)
    with CompiledTraffic() as watch, torch.no_grad():
        compiled = torch.compile(function, backend="qpass", options=ALL, fullgraph=True)
        compiled(x)
        found = check_sent(compiled, x, payloads=48 * 64 + 16 * 96)
    assert (watch.before, watch.after) == ([{"all_gather float32": 2}], [{"all_gather uint8": 1}])
    assert {record.kernel for record in watch.decisions} == {"all_gather of float8_e4m3fn, joined with 1 other"}
    assert torch.equal(found, F.linear(F.linear(x, plain[0]).relu(), plain[1]))


def two_meshes(rank: int, world: int) -> None:
    """Weights cut in two ways: tensor parallel inside pairs of ranks, sharded data parallel across the pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    up, down = nn.Linear(64, 96, bias=False), nn.Linear(96, 32, bias=False)
    # (data, tensor): the rows of the first weight and the columns of the second are those of a rank's tensor part
    for module, cut in ((up, [Shard(1), Shard(0)]), (down, [Shard(0), Shard(1)])):
        module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, cut))
        rule = Gathered([Replicate(), cut[1]], [Partial("avg"), cut[1]])
        parametrize.register_parametrization(module, "weight", rule, unsafe=True)

    def loss(x: Tensor) -> Tensor:
        part = F.linear(F.linear(x, up.weight).relu(), down.weight)
        whole = DTensor.from_local(part, mesh["tensor"], [Partial()]).redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Replicate()]).square().mean()

    x = value(rank // 2, 16, 64)  # a batch for each pair
    with CompiledTraffic() as watch:
        compiled = torch.compile(loss, backend="qpass", options=ALL, fullgraph=True)
        for _ in range(2):
            up.zero_grad()
            down.zero_grad()
            gathers, sums = [48 * 32, 16 * 48], [16 * 32]
            found = check_sent(compiled, x, payloads=payload_bytes(*gathers, *sums))
            check_sent(found.backward, payloads=payload_bytes(*gathers))
    assert watch.before == [{"all_gather float32": 2, "all_reduce float32": 1}, {"reduce_scatter float32": 2}]
    assert watch.after == [{"all_gather uint8": 2}, {"all_to_all uint8": 1}]  # both weights at once

    data, tensor = mesh.get_group("data"), mesh.get_group("tensor")
    first, second = (weight.to_local().detach() for weight in (*up.parameters(), *down.parameters()))  # type: ignore[attr-defined]
    columns, rows = first.new_empty(2 * 48, 32), first.new_empty(32, 48)
    comm.all_gather(columns, first, group=data, codec=INT8)
    comm.all_gather(rows, second, group=data, codec=INT8)
    weights = [torch.cat(columns.chunk(2), 1).requires_grad_(), rows.requires_grad_()]
    part = F.linear(F.linear(x, weights[0]).relu(), weights[1])
    whole = part.detach().clone()
    comm.all_reduce(whole, group=tensor, codec=INT8)
    torch.testing.assert_close(found, whole.square().mean(), rtol=1e-6, atol=0)  # a mean in another order
    part.backward(2 * whole / whole.numel())
    wanted = [torch.empty_like(first), torch.empty_like(second)]
    by_rows: list[Any] = [torch.cat(weights[0].grad.chunk(2, 1)), weights[1].grad]
    for gradient, of_all, module in zip(wanted, by_rows, (up, down), strict=True):
        comm.reduce_scatter(gradient, of_all, op=dist.ReduceOp.AVG, group=data, codec=INT8)
        (parameter,) = module.parameters()
        own = parameter.grad.to_local()  # type: ignore[union-attr]
        assert ((own - gradient).abs() <= 2 * INT8.error_bound(gradient) + 1e-6).all()  # as in `simple_fsdp`
        assert (own == gradient).float().mean() > 0.95
    losses = everywhere(found.detach())
    assert torch.equal(losses[0], losses[1])  # of one batch
    assert torch.equal(losses[2], losses[3])
