"""Programs made up from a seed: a few lanes, each of which sends a tensor, and maybe what came of it once more.

    x -> scaled, turned -> rounded or not -> collective -> cast, rectified -> maybe another collective

Every rank makes up the same program and gets values of its own. Compressed, it is held against the graph in which
what is sent is rounded and then travels plain: against the oracle of the collective rules.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from qpass import comm
from qpass.comm.graph.collective import KINDS
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.graph.passes.insert_codecs import InsertCodecs
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.ir.record import NodeRecord
from ranks import everywhere

ops = torch.ops._c10d_functional
qd = torch.ops.quantized_decomposed

CODECS = ("int8", "int6", "int4", "fp8_e4m3", "mxint8", "int4:32:bf16:hadamard", "bf16")
SAME_ON_ALL = ("all_gather", "all_reduce", "broadcast")
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Lane:
    """What one tensor goes through. ``group`` is a name; ``splits`` are the rows each rank sends to each other."""

    kind: str
    group: str
    world: int
    op: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    scale: float
    turned: bool
    rounded: str
    cast: torch.dtype | None
    rectified: bool
    splits: tuple[tuple[int, ...], ...] = ()
    again: Lane | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """The lane as a function that can be traced."""
        if x.dtype.is_floating_point:
            x = x * self.scale
        if self.turned and x.dim() == 2:
            x = x.t().contiguous().view(x.shape)
        y = ops.wait_tensor(self._send(_rounded(x, self.rounded)))
        if self.cast is not None and y.dtype.is_floating_point:
            y = torch.ops.prims.convert_element_type(y, self.cast)
        y = y.relu() if self.rectified and y.dtype.is_floating_point and y.dtype.itemsize > 1 else y
        return y if self.again is None else self.again(y)

    def _send(self, x: Tensor) -> Tensor:
        if self.kind == "all_gather":
            return ops.all_gather_into_tensor(x, self.world, self.group)
        if self.kind == "all_reduce":
            return ops.all_reduce(x, self.op, self.group)
        if self.kind == "reduce_scatter":
            return ops.reduce_scatter_tensor(x, self.op, self.world, self.group)
        if self.kind == "broadcast":
            return ops.broadcast(x, 0, self.group)
        rank = dist.get_rank()
        sends = self.splits[rank] if self.splits else [x.shape[0] // self.world] * self.world
        takes = [row[rank] for row in self.splits] if self.splits else sends
        return ops.all_to_all_single(x, list(takes), list(sends), self.group)

    @property
    def tolerance(self) -> float:
        """How far results may be from the oracle's, in units of the largest value that any rank sends.

        In float32 two terms have one sum, whatever their order. In half precision the oracle rounds each decoded term
        and then their sum; the payloads are summed in float32 and rounded once: three roundings of half a unit in the
        last place, the last of a sum of up to twice the size.
        """
        is_summed = self.kind in ("all_reduce", "reduce_scatter") and self.dtype in HALF
        return (0.5 + 0.5 + 2 * 0.5) * torch.finfo(self.dtype).eps if is_summed else 0.0


@dataclass(frozen=True)
class Program:
    """Lanes, and the policy they are compressed by."""

    seed: int
    lanes: tuple[Lane, ...]
    policy: comm.Policy

    def inputs(self, rank: int) -> list[Tensor]:
        """The values of one rank: of many sizes, or whole numbers."""
        generator = torch.Generator().manual_seed(self.seed * 64 + rank)
        return [_values(lane, rank, generator) for lane in self.lanes]

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The program as a function that can be traced."""
        return tuple(lane(x) for lane, x in zip(self.lanes, inputs, strict=True))


def program(seed: int, groups: list[tuple[str, int]]) -> Program:
    """The program of a seed over groups of these names and sizes, the same on every rank."""
    choose = random.Random(seed)
    kinds = sorted(comm.policy.cost.FORMS)
    if choose.random() < 0.5:  # lanes that may be joined
        places, one = [choose.choice(groups)], [choose.choice(kinds)]
        lanes = tuple(_lane(choose, places, one) for _ in range(choose.randint(3, 5)))
        policy = comm.Policy(choose.choice(CODECS), tuple(kinds), 0)
    else:
        lanes = tuple(_lane(choose, groups, kinds) for _ in range(choose.randint(1, 4)))
        kinds = choose.sample(kinds, choose.randint(1, 5))
        policy = comm.Policy(choose.choice(CODECS), tuple(kinds), choose.choice((0, 0, 2048)))
    if choose.random() < 0.3:
        policy = policy.override(choose.choice((None, *CODECS)), kind=choose.choice(sorted(comm.policy.cost.FORMS)))
    return Program(seed, lanes, policy)


def _lane(choose: random.Random, groups: list[tuple[str, int]], kinds: list[str]) -> Lane:
    group, world = choose.choice(groups)
    kind = choose.choice(kinds)
    dtype = choose.choice((torch.float32, torch.float32, torch.float32, *HALF, torch.int64))
    rows, columns = world * choose.randint(1, 9), choose.choice((1, 3, 32, 50, 128, 200))
    shape = (rows,) if choose.random() < 0.2 else (rows, columns)
    splits = ()
    if kind == "all_to_all" and world == 2 and choose.random() < 0.3 and rows > 2:
        some = choose.randint(1, rows // 2 - 1)
        splits = ((some, rows - some), (rows - some, some))
    lane = Lane(
        kind, group, world, choose.choice(("sum", "sum", "avg", "max")), dtype, shape, choose.choice((0.01, 1.0, 30.0)),
        choose.random() < 0.3, choose.choice(("", "", "", "payload", "per_tensor")),
        choose.choice((None, None, torch.bfloat16, torch.float8_e4m3fn)), choose.random() < 0.5, splits,
    )  # fmt: skip
    if lane.dtype is torch.float32 and lane.cast is None and choose.random() < 0.4:
        second = replace(_lane(choose, groups, kinds), kind=choose.choice(("all_reduce", "all_gather", "broadcast")))
        lane = replace(lane, again=replace(second, dtype=torch.float32, splits=(), again=None))
    return replace(lane, op="sum" if dtype is torch.int64 and lane.op == "avg" else lane.op)


def _rounded(x: Tensor, how: str) -> Tensor:
    if how == "" or not x.dtype.is_floating_point:
        return x
    if how == "payload":
        payload = torch.ops.qpass.encode(x, "int8:128:bf16")
        return torch.ops.qpass.decode(payload, x.numel(), x.dtype, "int8:128:bf16").view(x.shape)
    codes = qd.quantize_per_tensor(x.float(), 0.05, 3, -128, 127, torch.int8)
    return qd.dequantize_per_tensor(codes, 0.05, 3, -128, 127, torch.int8).to(x.dtype)


def _values(lane: Lane, rank: int, generator: torch.Generator) -> Tensor:
    shape = (sum(lane.splits[rank]), *lane.shape[1:]) if lane.splits else lane.shape
    if lane.dtype is torch.int64:
        return torch.randint(-100, 100, shape, generator=generator)
    size = torch.randn(shape, generator=generator).exp()
    return (torch.randn(shape, generator=generator) * size).to(lane.dtype)


def traced(function: Callable[..., Any], inputs: list[Tensor]) -> fx.GraphModule:
    mode = FakeTensorMode()
    with mode:
        return make_fx(lambda *given: function(*given))(*(mode.from_tensor(x) for x in inputs))


@functools.cache
def groups() -> list[tuple[str, int]]:
    """Names and sizes: all ranks, the same again as another group, and each rank by itself."""
    everyone = list(range(dist.get_world_size()))
    default, twin = dist.group.WORLD, dist.new_group(everyone)
    alone = [dist.new_group([rank]) for rank in everyone][dist.get_rank()]
    assert default is not None
    return [(default.group_name, default.size())] * 2 + [(twin.group_name, twin.size()), (alone.group_name, 1)]


def check(seed: int, rank: int, compiled: bool = False) -> tuple[list[NodeRecord], list[str]]:
    """Run one program: its decisions as made for Inductor, and what is wrong with it on any rank.

    Made ready for Inductor it gives the same bits, and so it does ``compiled`` by `torch.compile`.
    """
    made = program(seed, groups())
    inputs = made.inputs(rank)
    plain = traced(made, inputs)
    oracle, narrow, ready = (copy.deepcopy(plain) for _ in range(3))
    LowerCollectives().run(oracle)  # what others rounded is sent narrow, bit for bit
    InsertCodecs(made.policy).run(oracle)
    oracle.recompile()
    compress(narrow, _fitting(made.policy, plain))
    compress(ready, _fitting(made.policy, plain), inductor=True)
    expected, found, joined = oracle(*inputs), narrow(*inputs), ready(*inputs)
    decisions = [(record.op, record.kernel, record.reason) for record in collectives(ready)]
    faults = [] if len({repr(one) for one in gathered(decisions)}) == 1 else [f"ranks decide differently: {decisions}"]
    for lane, x, reference, result in zip(made.lanes, inputs, expected, found, strict=True):
        faults += [f"{fault}: {lane}" for fault in _differences(lane, x, reference, result)]
    others = {"ready for Inductor": joined}
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(made, backend="qpass", options={"comm": made.policy}, dynamic=False)
        others["compiled"] = call(*inputs)
    for how, again in others.items():
        same = [torch.equal(bits(one), bits(other)) for one, other in zip(again, found, strict=True)]
        faults += [f"other bits when {how}: {lane}" for lane, ok in zip(made.lanes, same, strict=True) if not ok]
    everyones = sorted({f"seed {seed}: {fault}" for faults in gathered(faults) for fault in faults})
    return collectives(ready), everyones


def _differences(lane: Lane, x: Tensor, reference: Tensor, result: Tensor) -> Iterator[str]:
    """What is wrong with the result of one lane. All ranks make the same calls here, whatever each of them finds."""
    last = lane.again or lane
    is_same = last.kind in SAME_ON_ALL and last.world == dist.get_world_size()
    if is_same and len({tuple(one.tolist()) for one in everywhere(result)}) > 1:
        yield "the ranks have different results"
    if result.dtype != reference.dtype or result.shape != reference.shape:
        yield f"{result.dtype} {list(result.shape)} instead of {reference.dtype} {list(reference.shape)}"
    elif not lane.tolerance:
        if not torch.equal(bits(result), bits(reference)):
            off = (result.float() - reference.float()).abs().max()
            yield f"other bits than the oracle, up to {off}"
    else:
        largest = (x.float() * lane.scale).abs().max()
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        step = torch.finfo(lane.cast).eps if lane.cast is not None else 0.0  # a cast may fall on either side
        off = (result.float() - reference.float()).abs().max()
        if off > (lane.tolerance + 2 * step) * 1.1 * largest:  # a decoded value may be a little larger than any sent
            yield f"{off} from the oracle, of {largest}"


def gathered(value: Any) -> list[Any]:
    """The value of every rank."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _fitting(policy: comm.Policy, gm: fx.GraphModule) -> comm.Policy:
    """The policy without overrides for kinds that the graph does not have, which would be refused."""
    kinds = {KINDS.get(node.target) for node in gm.graph.nodes}
    return replace(policy, overrides=tuple(override for override in policy.overrides if override.kind in kinds))


def some(rank: int, world: int) -> None:
    """A few programs, one of them compiled."""
    _run(range(8), rank, every=8)


def many(rank: int, world: int) -> None:
    """200 programs, every twentieth of them compiled."""
    _run(range(200), rank, every=20)


def _run(seeds: range, rank: int, every: int) -> None:
    checked = [check(seed, rank, compiled=seed % every == 0) for seed in seeds]
    faults = [fault for _, faults in checked for fault in faults]
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults)
    found = [record for records, _ in checked for record in records]  # else they are not about compression any more
    assert sum(record.outcome == "lowered" for record in found) > len(seeds) / 2
    assert sum(", joined with" in record.kernel for record in found) > len(seeds) / 5
