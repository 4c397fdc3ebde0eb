"""What `qpass.report` says of a DDP hook and of `compress_fsdp`: the bytes on the wire, and why some go plain."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, ShardPlacementResult
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

import qpass.comm
import ranks
from compiled_traffic import bytes_sent, value

CASES = [
    "hybrid_sharding_counts_what_the_wire_carries", "replicas_alone", "all_reduce_alone_in_full", "mixed_dtypes",
    "small_units", "unused_parameters", "compressing_again", "modules_in_one_unit",
    "units_of_one_module",
    "sharding_again_after_forward", "gathering_ahead", "a_hook_says_what_it_sent",
    "sparse_gradients", "complex_gradients", "strictness",
]  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, list[str]]:
    return ranks.run(__file__, 4, CASES)


@pytest.mark.parametrize("case", CASES)
def test_what_is_sent(said: dict[str, list[str]], case: str) -> None:
    assert said[case] == [ranks.OK] * 4


def linears(count: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(count)))


def sharded(model: nn.Sequential, mesh: DeviceMesh, **options: Any) -> Any:
    for layer in model:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def step(model: Any) -> Tensor:
    loss = model(value(dist.get_rank(), 4, 64)).square().mean()
    loss.backward()
    return loss.detach()


def gradients(model: Any) -> Tensor:
    return torch.cat([parameter.grad.full_tensor().flatten() for parameter in model.parameters()])


def near(found: Tensor, expected: Tensor, most: float = 0.02) -> bool:
    """Codes of int8 are off by 0.7 %, of gradients twice and of parameters; a factor of 2 or 4 is not that."""
    return bool((found - expected).norm() < most * expected.norm())


def hybrid_sharding_counts_what_the_wire_carries(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    plain, model = sharded(linears(), mesh), sharded(linears(), mesh)
    done = qpass.comm.compress_fsdp(model)
    for each in (plain, model):
        step(each)
    assert near(gradients(model), gradients(plain))
    before, counted = bytes_sent(), done.statistics.bytes
    step(model)
    sent, counted = bytes_sent() - before, done.statistics.bytes - counted
    assert counted <= sent <= counted + 50 * 64  # a header of 48 bytes a message
    report = qpass.report(done)
    # a shard is 32 * 64 weights, 16 rows, and 32 of the bias, a row: 17 rows of 130 bytes instead of 2080 floats
    assert {(row.place, row.collective): (row.calls, row.bytes, row.plain_bytes) for row in report.rows} == {
        (place, collective): (calls, calls * 17 * 130, calls * 2080 * 4)
        for place in "01"
        for collective, calls in (("all_gather", 4), ("reduce_scatter", 2), ("all_reduce", 2))
    }
    assert report.bytes == done.statistics.bytes
    assert report.plain_bytes == done.statistics.plain_bytes
    assert not report.missed


def replicas_alone(rank: int, world: int) -> None:
    """Four replicas of one shard: two transfers, in which every rank sums as many rows: 9 rather than 33 / 4."""
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("replicas", "shards"))
    plain, model = sharded(linears(), mesh), sharded(linears(), mesh)
    done = qpass.comm.compress_fsdp(model)
    for each in (plain, model):
        step(each)
    assert near(gradients(model), gradients(plain))
    before = bytes_sent()
    step(model)
    rows = qpass.report(done).rows
    assert [(row.collective, row.calls, row.bytes) for row in rows] == [("all_reduce", 2, 2 * 2 * 3 * 9 * 130)] * 2
    assert 0 <= bytes_sent() - before - 2 * 2 * 3 * 9 * 130 <= 50 * 64


def all_reduce_alone_in_full(rank: int, world: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = sharded(linears(), mesh)
    done = qpass.comm.compress_fsdp(model, all_reduce=None)
    step(model)
    assert {row.collective for row in done.entries} == {"all_gather", "reduce_scatter"}
    model = sharded(linears(), mesh)
    done = qpass.comm.compress_fsdp(model, all_gather=None, reduce_scatter=None, all_reduce="int4")
    step(model)
    assert {(row.collective, row.sent_as) for row in done.entries} == {("all_reduce", "int4:32:bf16")}


class Adapted(nn.Module):
    """A frozen layer and a trained one, of different dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.adapter = nn.Linear(64, 64).bfloat16().requires_grad_(False), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.adapter(self.base(x.bfloat16()).to(self.adapter.weight.dtype))


def mixed_dtypes(rank: int, world: int) -> None:
    """A frozen bfloat16 layer beside trained float32 ones: FSDP2 gathers bytes, unless it casts to one dtype."""
    mesh = init_device_mesh("cpu", (world,))
    for policy in (MixedPrecisionPolicy(), MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float32)):
        model = nn.Sequential(Adapted())
        done = qpass.comm.compress_fsdp(sharded(model, mesh, mp_policy=policy))
        step(model)
        told = {(row.collective, row.sent_as, row.reason) for row in done.entries}
        several = "its parameters have several dtypes, so FSDP2 gathers bytes"
        gathered = ("int8:128:bf16", "") if policy.param_dtype else ("", several)
        assert told == {("all_gather", *gathered), ("reduce_scatter", "int8:128:bf16", "")}


def small_units(rank: int, world: int) -> None:
    """16 floats of a shard are 64 bytes, a row of codes is 130."""
    model = nn.Sequential(nn.LayerNorm(64, bias=False), nn.Linear(64, 64))
    plain, model = (sharded(each, init_device_mesh("cpu", (world,))) for each in (model, copy.deepcopy(model)))
    done = qpass.comm.compress_fsdp(model)
    for each in (plain, model):
        step(each)
    assert near(gradients(model), gradients(plain))
    by_place = {(row.place, row.collective): row for row in done.entries}
    for collective in ("all_gather", "reduce_scatter"):
        row = by_place["0", collective]
        assert (row.sent_as, row.reason, row.missed) == ("", "its codes would be no fewer bytes", True)
        assert row.bytes == row.plain_bytes == row.calls * 3 * 64
        assert by_place["1", collective].sent_as == "int8:128:bf16"


class Partly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.unused, self.last = (nn.Linear(64, size) for size in (64, 128, 32))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def unused_parameters(rank: int, world: int) -> None:
    """Only parameters with a gradient are reduced: what lies where follows from them."""
    torch.manual_seed(0)
    whole = nn.Sequential(Partly())
    plain, model = (sharded(copy.deepcopy(whole), init_device_mesh("cpu", (world,))) for _ in "ab")
    done = qpass.comm.compress_fsdp(model)
    for each in (plain, model):
        step(each)
    for (name, own), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if "unused" in name:
            assert own.grad is None
        else:
            assert near(own.grad.full_tensor(), other.grad.full_tensor()), name
    (row,) = (row for row in done.entries if row.collective == "reduce_scatter")
    assert row.bytes == 3 * (8 + 1 + 4 + 1) * 130  # 16 * 64 weights and 16 of the bias, and half of that


def compressing_again(rank: int, world: int) -> None:
    """The second call takes the place of the first."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
    model = sharded(linears(), mesh)
    first = qpass.comm.compress_fsdp(model)
    second = qpass.comm.compress_fsdp(model, "int4", "int4")
    step(model)
    assert first.entries == ()
    assert {row.sent_as for row in second.entries} == {"int4:32:bf16"}
    assert {row.collective for row in second.entries} == {"all_gather", "reduce_scatter", "all_reduce"}


def modules_in_one_unit(rank: int, world: int) -> None:
    """Modules that are sharded together are one unit, and one row."""
    model = linears()
    fully_shard([model[0], model[1]], mesh=init_device_mesh("cpu", (world,)))
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    done = qpass.comm.compress_fsdp(model)
    step(model)
    assert [(row.place, row.collective) for row in done.entries] == [("0", "all_gather"), ("0", "reduce_scatter")]
    assert done.entries[1].bytes == 3 * 2 * (8 + 1) * 130


def units_of_one_module(rank: int, world: int) -> None:
    """Parameters of one module on two meshes: torch's own setters refuse it, for they have one collective for both."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    flat = init_device_mesh("cpu", (world,))
    models = []
    for _ in "ab":
        model = linears()
        own = set(model[0].parameters())
        inner, whole = FSDPMeshInfo(mesh["inner"], shard_mesh_dim=0), FSDPMeshInfo(flat, shard_mesh_dim=0)

        def place(parameter: nn.Parameter, own: Any = own, inner: Any = inner, whole: Any = whole) -> Any:
            return ShardPlacementResult(Shard(0), inner if parameter in own else whole)

        models.append(fully_shard(model, mesh=flat, shard_placement_fn=place))
    done = qpass.comm.compress_fsdp(models[1])
    plain, model = models
    for each in models:
        step(each)
    assert near(gradients(model), gradients(plain))
    assert {(row.place, row.collective, row.bytes) for row in done.entries} == {
        ("(root) [0]", "all_gather", 17 * 130), ("(root) [0]", "reduce_scatter", 17 * 130),
        ("(root) [1]", "all_gather", 3 * 9 * 130), ("(root) [1]", "reduce_scatter", 3 * 9 * 130),
    }  # fmt: skip


def sharding_again_after_forward(rank: int, world: int) -> None:
    """After forward over 2 ranks only: the shards that backward gathers are twice as large."""
    plain, model = (sharded(linears(), init_device_mesh("cpu", (world,)), reshard_after_forward=2) for _ in "ab")
    done = qpass.comm.compress_fsdp(model)
    for each in (plain, model):
        step(each)
    assert near(gradients(model), gradients(plain))
    gathered = [row for row in done.entries if row.collective == "all_gather"]
    assert [(row.calls, row.bytes) for row in gathered] == [(2, 3 * 9 * 130 + 17 * 130)] * 2
    assert not qpass.report(done).missed


def gathering_ahead(rank: int, world: int) -> None:
    """What is gathered on a thread lies in its place once it was waited for."""
    model = sharded(linears(), init_device_mesh("cpu", (world,)))
    done = qpass.comm.compress_fsdp(model)
    whole = model[0][0].weight.full_tensor()
    handle = model[0].unshard(async_op=True)
    handle.wait()
    assert near(model[0][0].weight, whole)
    assert near(model[0][0].bias, linears()[0][0].bias.detach())
    assert [row.calls for row in done.entries] == [1]


def a_hook_says_what_it_sent(rank: int, world: int) -> None:
    hook = qpass.comm.ddp_hook(warm_up=1)
    model = DistributedDataParallel(linears(1))
    model.register_comm_hook(None, hook)
    assert "nothing was sent yet" in str(qpass.report(hook))
    for _ in range(2):
        step(model)
    before = bytes_sent()
    step(model)
    assert 0 <= bytes_sent() - before - 2 * 3 * 9 * 130 <= 50 * 64  # a header of 48 bytes a message
    report = qpass.report(hook, strict=True)  # the caller asked for the warm-up
    place, plain = "bucket 0: 4160 elements of 2 parameters", 2 * 3 * 4160
    assert [(row.place, row.calls, row.bytes, row.plain_bytes, row.sent_as, row.reason) for row in report.rows] == [
        (place, 1, plain, plain, "", "a step of the warm-up"),
        (place, 2, 2 * 2 * 3 * 9 * 130, 2 * plain, "int8:128:bf16", ""),  # of 33 rows each rank sums 9, the last fewer
    ]
    assert json.loads(json.dumps(report.to_dict()))["bytes"] == hook.statistics.bytes == report.bytes
    text, html = (report._repr_mimebundle_()[f"text/{kind}"] for kind in ("plain", "html"))
    assert text == str(report)
    for words in ("DDP hook, int8:128:bf16", "1 of 2 compressed", place, "a step of the warm-up"):
        assert words in text
        assert words in html


class Looked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 16, sparse=True), nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def sparse_gradients(rank: int, world: int) -> None:
    """The table's gradient is averaged as torch's hook does it; the rest of the model is compressed."""
    found = {}
    for name, hook in {"plain": None, "int8": qpass.comm.ddp_hook(), "int4": feedback_hook()}.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(Looked())
        if hook is not None:
            model.register_comm_hook(None, hook)
        for _ in range(2):
            model.zero_grad()
            model(torch.tensor([[1, 2 + rank]])).square().sum().backward()
        assert model.module.table.weight.grad.is_sparse
        found[name] = model.module.table.weight.grad.to_dense()
        if hook is not None:
            rows = qpass.report(hook).rows  # DDP forms other buckets after the first step
            sparse = [row for row in rows if row.reason == "the gradient is sparse"]
            assert sum(row.calls for row in sparse) == sum(row.calls for row in rows if row.sent_as) == 2
            for row in sparse:  # two rows of 16 float32, each with an index of 8 bytes
                assert row.bytes == row.plain_bytes == row.calls * 3 * 2 * (16 * 4 + 8)
    assert torch.equal(found["plain"], found["int8"])
    assert torch.equal(found["plain"], found["int4"])


def feedback_hook() -> Any:
    return qpass.comm.ddp_hook(4, error_feedback=True)


class Wave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = (nn.Parameter(torch.randn(300, dtype=torch.complex64)) for _ in "wv")
        self.real = nn.Parameter(torch.randn(300))

    def forward(self, x: Tensor) -> Tensor:
        return (self.real * x * self.w + self.v).abs()


def complex_gradients(rank: int, world: int) -> None:
    """Each is coded as pairs of real numbers; the second one starts where the first one's pairs end."""
    found = {}
    for name, hook in {
        "plain": None,
        "int8": qpass.comm.ddp_hook(),
        "fed": qpass.comm.ddp_hook(error_feedback=True),
    }.items():
        torch.manual_seed(0)
        model = DistributedDataParallel(Wave())
        if hook is not None:
            model.register_comm_hook(None, hook)
        for _ in range(3):  # from the second step on, buckets are others
            model.zero_grad()
            model(value(rank, 300)).sum().backward()
        found[name] = [parameter.grad for parameter in model.parameters()]
        if hook is not None:
            assert {row.sent_as for row in qpass.report(hook, strict=True).rows} == {"int8:128:bf16"}
    for name in ("int8", "fed"):
        for own, plain in zip(found[name], found["plain"], strict=True):
            assert own.dtype == plain.dtype
            # ranks cancel out to half the norm, and feedback adds the error of the step before; misplaced, it is over 1
            assert near(own, plain, 0.05), (name, (own - plain).norm() / plain.norm())
            assert not torch.equal(own, plain)


def strictness(rank: int, world: int) -> None:
    model = sharded(nn.Sequential(nn.LayerNorm(64, bias=False)), init_device_mesh("cpu", (world,)))
    done = qpass.comm.compress_fsdp(model, reduce_scatter=None)
    step(model)
    with pytest.raises(qpass.errors.StrictError, match=r"0 \(all_gather\): its codes would be no fewer bytes"):
        qpass.report(done, strict=True)
