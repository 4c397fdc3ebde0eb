"""Every collective, on real ranks, against what one process computes from all ranks' inputs: bit for bit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import ranks
from qpass import comm
from qpass.comm.eager import schedule
from qpass.comm.wire import partition
from qpass.comm.wire.codec import NAMES
from qpass.errors import AgreementError

CODECS = [
    *NAMES, "int8:64:fp32:stochastic", "int8:128:bf16:hadamard", "int4:32:bf16:hadamard", "int6:32:e8m0:stochastic",
    "int4:10:bf16",
]  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FEW = ["int8", "int4", "bf16", "int4:32:bf16:hadamard"]
SIZES = (0, 1, 131, 2600)  # with pieces of 512 elements: nothing, a part of a row, one piece, several

CASES = {
    2: ["all_reduces", "stochastic_all_reduces", "others", "async_calls", "integers", "inputs_of_any_strides",
        "lost_blocks", "declined_calls"],
    3: ["few_all_reduces", "few_others", "subgroups"],
    4: ["few_all_reduces_of_a_mesh", "subgroups", "few_all_reduces", "async_calls"],
}  # fmt: skip
SLOW = {
    3: ["all_reduces", "stochastic_all_reduces", "others", "async_calls", "lost_blocks"],
    4: [
        "all_reduces",
        "stochastic_all_reduces",
        "all_reduces_of_a_mesh",
        "others",
        "integers",
        "lost_blocks",
        "declined_calls",
    ],
    8: [
        "all_reduces",
        "stochastic_all_reduces",
        "all_reduces_of_a_mesh",
        "others",
        "async_calls",
        "subgroups",
        "integers",
        "inputs_of_any_strides",
        "lost_blocks",
        "declined_calls",
    ],
}


@functools.cache
def results(world: int, slow: bool = False) -> dict[str, list[str]]:
    return ranks.run(__file__, world, (SLOW if slow else CASES)[world], timeout=60)


@pytest.mark.parametrize(("world", "case"), [(world, case) for world in CASES for case in CASES[world]])
def test_on_real_ranks(world: int, case: str) -> None:
    assert results(world)[case] == [ranks.OK] * world


@pytest.mark.slow
@pytest.mark.parametrize(("world", "case"), [(world, case) for world in SLOW for case in SLOW[world]])
def test_on_more_ranks(world: int, case: str) -> None:
    assert results(world, slow=True)[case] == [ranks.OK] * world


# What runs on each rank


def value(rank: int, numel: int, dtype: torch.dtype, salt: int = 0) -> Tensor:
    """The input of a rank, known to all: gradients have this range of sizes, and no order among neighbours."""
    generator = torch.Generator().manual_seed(1000 * numel + 10 * rank + salt)
    scale = torch.randn(numel, generator=generator).exp()
    return (torch.randn(numel, generator=generator) * scale).to(dtype)


def received(x: Tensor, codec: comm.Codec) -> Tensor:
    """What a receiver makes of `x`, in float32."""
    return codec.decode(codec.encode(x), x.numel())


def summed(values: list[Tensor], divisor: int = 1) -> Tensor:
    return functools.reduce(torch.add, values) / divisor


def assert_agreed(x: Tensor) -> None:
    """All ranks hold the same bytes."""
    assert all(torch.equal(other, x.view(-1).view(torch.uint8)) for other in ranks.everywhere(x) if x.numel())


def declined_calls(rank: int, world: int) -> None:
    """On a link that the cost model takes for fast, calls send in full; on a slow one, codes."""
    fast = comm.Link(bandwidth=1e12, latency=1e-6, encode=1e9, decode=1e9)
    slow = comm.Link(bandwidth=1e6, latency=1e-6, encode=1e9, decode=1e9)
    inputs = [value(other, 2600, torch.float32) for other in range(world)]
    for link, codec in ((fast, "fp32"), (slow, "int4")):
        for async_op in (False, True):
            options = {"async_op": async_op, "link": link}
            got = [received(x, comm.codec(codec)) for x in inputs]
            outs = [inputs[rank].clone(), torch.empty(2600), *(torch.empty(world * 2600) for _ in range(2)),
                    inputs[rank].clone()]  # fmt: skip
            many = inputs[rank].repeat(world)
            works = [
                comm.all_reduce(outs[0], "avg", codec="int4", schedule="one_shot", **options),
                comm.reduce_scatter(outs[1], many, "avg", codec="int4", **options),
                comm.all_gather(outs[2], inputs[rank], codec="int4", **options),
                comm.all_to_all(outs[3], many, codec="int4", **options),
                comm.broadcast(outs[4], world - 1, codec="int4", **options),
            ]
            for work in works if async_op else ():
                work.wait()
            expected = [summed(got, world), summed(got, world), torch.cat(got), torch.cat(got), got[-1]]
            for out, right in zip(outs[2:], expected[2:], strict=True):
                assert torch.equal(out, right)
            for out, right in zip(outs[:2], expected[:2], strict=True):  # torch's own sums have an order of their own
                size = sum(x.abs() for x in got)
                assert ((out - right).abs() <= 2.0**-22 * size).all()
    if world > 2:
        mesh = dist.init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("across", "inside"))
        for op, divisor in (("sum", 1), ("avg", world)):
            x = inputs[rank].clone()
            comm.all_reduce(x, op, mesh, "int4", link=fast)
            assert ((x - summed(inputs, divisor)).abs() <= world * 2.0**-23 * sum(y.abs() for y in inputs)).all()
    with pytest.raises(AgreementError, match=r"schedule: .*'plain'"):
        comm.all_reduce(torch.ones(3000), link=(fast, slow)[rank % 2])


def in_pieces() -> None:
    partition.CHUNK = 512  # so that small tensors, too, are cut into pieces


def few_all_reduces(rank: int, world: int) -> None:
    all_reduces(rank, world, FEW, (torch.bfloat16, torch.float64))


def all_reduces(rank: int, world: int, codecs: Sequence[str] = CODECS, dtypes: Sequence[torch.dtype] = DTYPES) -> None:
    in_pieces()
    turns = itertools.count()
    for name, dtype, how in itertools.product(codecs, dtypes, ("one_shot", "two_shot")):
        codec = comm.codec(name)
        if codec.stochastic:
            continue
        for numel, op in zip(SIZES, itertools.cycle(("sum", "avg"))):
            inputs = [value(other, numel, dtype) for other in range(world)]
            divisor = world if op == "avg" else 1
            x = inputs[rank].clone()
            assert comm.all_reduce(x, op, codec=codec, schedule=how) is None
            assert_agreed(x)
            if next(turns) % world != rank:
                continue  # all hold the same, so one rank looks whether it is right
            expected = summed([received(other, codec) for other in inputs], divisor)
            bound = sum(codec.error_bound(other) for other in inputs) / divisor
            if how == "two_shot":
                bound = bound + codec.error_bound(expected)
                expected = received(expected, codec)
            assert torch.equal(x, expected.to(dtype)), (codec, dtype, how, numel)
            exact = summed([other.double() for other in inputs], divisor)
            # float32 sums of W values round W - 1 times, to 2^-24 of what is summed; the result's own rounding is last
            rounding = world * 2.0**-24 * sum(other.double().abs() for other in inputs)
            rounding = rounding + torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
            assert ((x.double() - exact).abs() <= bound + rounding).all(), (codec, dtype, how, numel)


def stochastic_all_reduces(rank: int, world: int) -> None:
    in_pieces()
    for name, how in itertools.product([name for name in CODECS if "stochastic" in name], ("one_shot", "two_shot")):
        codec = comm.codec(name)
        inputs = [value(other, 2600, torch.float32) for other in range(world)]
        bound = sum(codec.error_bound(other) for other in inputs)
        exact = summed([other.double() for other in inputs])
        first, again, other_seed = (inputs[rank].clone() for _ in range(3))
        for x, seed in ((first, 5), (again, 5), (other_seed, 6)):
            comm.all_reduce(x, codec=codec, schedule=how, seed=seed)
            assert_agreed(x)
            second = codec.error_bound(exact.abs() + bound) if how == "two_shot" else 0
            assert ((x.double() - exact).abs() <= bound + second + 1e-6 * exact.abs().max()).all()
        assert torch.equal(first, again)
        assert not torch.equal(first, other_seed)
        if how == "one_shot":  # two ranks with equal inputs do not round them alike: the errors would add up
            x = inputs[0].clone()
            comm.all_reduce(x, codec=codec, schedule=how, seed=5)
            assert not torch.equal(x / 2, codec.decode(codec.encode(inputs[0], 5), 2600))
            halves = x.double() / world - inputs[0].double()
            assert halves.square().mean() < 0.75 * (first_error(inputs[0], codec)).square().mean()


def first_error(x: Tensor, codec: comm.Codec) -> Tensor:
    return codec.decode(codec.encode(x, 99), x.numel()).double() - x.double()


def from_to(numel: int, dtype: torch.dtype, a: int, b: int) -> Tensor:
    """What rank a has for rank b."""
    return value(a, numel, dtype, salt=b + 1)


def few_others(rank: int, world: int) -> None:
    others(rank, world, FEW, (torch.float16,))


def others(
    rank: int,
    world: int,
    codecs: Sequence[str] = CODECS,
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float32),
) -> None:
    in_pieces()
    for name, dtype in itertools.product(codecs, dtypes):
        codec = comm.codec(name)
        if codec.stochastic:
            continue
        for numel in SIZES:
            share = functools.cache(functools.partial(from_to, numel, dtype))
            got = functools.cache(lambda a, b, share=share, codec=codec: received(share(a, b), codec))
            mine = torch.cat([share(rank, b) for b in range(world)])

            out = torch.empty(numel, dtype=dtype)
            comm.reduce_scatter(out, mine, "avg", codec=codec)
            assert torch.equal(out, summed([got(a, rank) for a in range(world)], world).to(dtype))

            out = torch.empty(world * numel, dtype=dtype)
            comm.all_gather(out, share(rank, 0), codec=codec)
            assert torch.equal(out, torch.cat([got(a, 0) for a in range(world)]).to(dtype))
            assert_agreed(out)

            out = torch.empty(world * numel, dtype=dtype)
            comm.all_to_all(out, mine, codec=codec)
            assert torch.equal(out, torch.cat([got(a, rank) for a in range(world)]).to(dtype))

            x = share(rank, 0).clone()
            comm.broadcast(x, src=world - 1, codec=codec)
            assert torch.equal(x, got(world - 1, 0).to(dtype))

        sizes = [[(a * b * 700) // (1 + a + b) for b in range(world)] for a in range(world)]  # rank 0 sends nothing
        parts = [[value(a, sizes[a][b], dtype, salt=b) for b in range(world)] for a in range(world)]
        takes = [sizes[a][rank] for a in range(world)]
        out = torch.empty(sum(takes), dtype=dtype)
        comm.all_to_all(out, torch.cat(parts[rank]), takes, sizes[rank], codec=codec)
        assert torch.equal(out, torch.cat([received(parts[a][rank], codec) for a in range(world)]).to(dtype))


def async_calls(rank: int, world: int) -> None:
    in_pieces()
    codec = comm.codec("int8")
    numel = 5000
    inputs = [value(other, numel, torch.float32) for other in range(world)]
    plain = inputs[rank].clone()
    comm.all_reduce(plain, "avg", codec=codec)
    mine = [inputs[rank].clone() for _ in range(4)]
    works = [comm.all_reduce(x, "avg", codec=codec, async_op=True) for x in mine]
    other = torch.full((10,), float(rank))  # the caller's own collectives may come between
    dist.all_reduce(other)
    gathered = torch.empty(world * numel)
    works.append(comm.all_gather(gathered, inputs[rank], codec=codec, async_op=True))
    assert all(isinstance(work, dist.Work) for work in works)
    works[0].wait()
    assert torch.equal(mine[0], plain)
    doubled = works[1].get_future().then(lambda future: 2 * future.value()[0])
    assert torch.equal(doubled.wait(), 2 * plain)
    for work in works:
        assert work.wait()
        assert work.is_completed()
        assert work.is_success()
    assert all(torch.equal(x, plain) for x in mine)
    assert torch.equal(gathered, torch.cat([received(x, codec) for x in inputs]))
    assert other[0] == sum(range(world))


def integers(rank: int, world: int) -> None:
    for dtype in (torch.int64, torch.int32, torch.uint8):
        x = torch.arange(5, dtype=dtype) + rank
        comm.all_reduce(x, codec="int4")
        assert x.tolist() == [world * i + sum(range(world)) for i in range(5)]
    flags = torch.tensor([rank == 0, True])
    out = torch.empty(2 * world, dtype=torch.bool)
    comm.all_gather(out, flags, codec="int4")
    assert out.tolist() == [value for other in range(world) for value in (other == 0, True)]
    z = torch.tensor([1.5 + 1j * rank])
    comm.broadcast(z, 1, codec="int4")
    assert z.item() == 1.5 + 1j
    large = torch.arange(2 * world) + 2**40 + 100 * rank
    out = torch.empty_like(large)
    comm.all_to_all(out, large, codec="int4", async_op=True).wait()
    assert out.tolist() == [2**40 + 100 * a + 2 * rank + i for a in range(world) for i in (0, 1)]


def inputs_of_any_strides(rank: int, world: int) -> None:
    inputs = [value(other, 60 * 40, torch.float32).view(60, 40) for other in range(world)]
    x = inputs[rank].t().clone(memory_format=torch.contiguous_format).t()  # [60, 40], strides (1, 60)
    y = inputs[rank].clone()
    comm.all_reduce(x)
    comm.all_reduce(y)
    assert torch.equal(x, y)
    assert x.stride() == (1, 60)
    every_other = torch.zeros(2400, 2)[:, 0]
    every_other.copy_(inputs[rank].flatten())
    comm.all_reduce(every_other)
    assert torch.equal(every_other, y.flatten())


def lost_blocks(rank: int, world: int) -> None:
    """An overflow of one rank is seen by all, in its block and nowhere else."""
    for bad, how in itertools.product((float("nan"), float("inf"), -float("inf")), ("one_shot", "two_shot")):
        x = value(rank, 1000, torch.float32)
        if rank == world - 1:
            x[300] = bad
        comm.all_reduce(x, schedule=how)
        lost = torch.zeros(1000, dtype=torch.bool)
        lost[256:384] = True
        assert torch.equal(x.isnan(), lost)
        assert not x.isinf().any()
        assert_agreed(x)
    gradients = [1e-10 * torch.randn(1000, generator=torch.Generator().manual_seed(other)) for other in range(world)]
    tiny, exact = gradients[rank].clone(), summed([gradient.double() for gradient in gradients])
    comm.all_reduce(tiny)
    assert (tiny.double() - exact).norm() <= 0.01 * exact.norm()


def subgroups(rank: int, world: int) -> None:
    members = list(range(0, world, 2))
    group = dist.new_group(members)
    alone = dist.new_group([1])
    if rank in members:
        inputs = [value(other, 3000, torch.float32) for other in members]
        x = inputs[members.index(rank)].clone()
        comm.all_reduce(x, group=group, codec="int4", async_op=True).wait()
        y = inputs[members.index(rank)].clone()
        comm.all_reduce(y, group=group, codec="int4")
        expected = summed([received(other, comm.codec("int4")) for other in inputs])
        if len(members) > 2 and comm.codec("int4").payload_bytes(3000) > schedule.ONE_SHOT_BYTES:
            expected = received(expected, comm.codec("int4"))
        assert torch.equal(x, expected)
        assert torch.equal(y, expected)
        z = torch.full((10,), float(rank))
        comm.broadcast(z, members[-1], group)
        assert (z - members[-1]).abs().max() <= members[-1] / 127
    if rank == 1:  # nothing is lost where nothing is sent
        x = value(0, 1000, torch.float32)
        y = x.clone()
        comm.all_reduce(y, "avg", group=alone, codec="int4")
        assert torch.equal(x, y)


def few_all_reduces_of_a_mesh(rank: int, world: int) -> None:
    all_reduces_of_a_mesh(rank, world, ("int8",), (torch.bfloat16, torch.float32))


def all_reduces_of_a_mesh(
    rank: int, world: int, codecs: Sequence[str] = ("int8", "int4", "bf16"), dtypes: Sequence[torch.dtype] = DTYPES
) -> None:
    in_pieces()
    for across in (2, world // 2):
        mesh = dist.init_device_mesh("cpu", (across, world // across), mesh_dim_names=("across", "inside"))
        for name, dtype, op in itertools.product(codecs, dtypes, ("sum", "avg")):
            codec = comm.codec(name)
            for numel in SIZES:
                inputs = [value(other, numel, dtype) for other in range(world)]
                divisor = world if op == "avg" else 1
                x = inputs[rank].clone()
                comm.all_reduce(x, op, mesh, codec)
                y = inputs[rank].clone()
                comm.all_reduce(y, op, mesh, codec, async_op=True).wait()
                assert torch.equal(x, y)
                assert_agreed(x)
                exact = summed([other.double() for other in inputs], divisor)
                # Sums inside a node lose nothing; across, each of them is coded, and the total perhaps again. A bound
                # by the largest magnitude of all holds wherever the parts and their blocks begin.
                size = sum(other.double().abs() for other in inputs).max().item() if numel else 0.0
                share = codec.error_bound(torch.tensor([size])).item() * 2 / divisor
                rounding = (torch.finfo(dtype).eps + world * 2.0**-23) * size
                assert ((x.double() - exact).abs() <= share * across + rounding).all(), (name, dtype, op, numel)
