"""What is told of compiled collectives, compiled anew or served from a cache; the cache serves nothing stale.

The process group is torch's fake one: it says it has 2 ranks, and moves nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.distributed import _functional_collectives as funcol
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

import qpass
from qpass.comm import Link, Policy
from qpass.comm.graph import inductor_pass as module
from qpass.errors import InputError, StrictError

ALL = Policy("int8", min_bytes=0)
PLAIN = Policy("int8", min_bytes=1 << 40)  # compresses nothing here, so that no kernel of a codec is compiled


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    start(2)
    with fresh_cache():
        yield
    dist.destroy_process_group()


def start(world: int) -> None:
    torch._dynamo.reset()
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())


class Sharded(nn.Module):
    """[8, 64] -> a number; its weight is gathered forward, and its gradient scattered backward."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(40, 32, bias=False)
        self.head.forward = self.gathered  # type: ignore[method-assign]

    def gathered(self, x: Tensor) -> Tensor:
        return x @ funcol.all_gather_tensor_autograd(self.head.weight, 0, dist.group.WORLD)

    def forward(self, x: Tensor) -> Tensor:
        largest = x.detach() * 2
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return self.head(x).square().sum() + largest.sum()


def step(policy: Policy, caches: bool = True) -> tuple[Any, list[str]]:
    """The report on one training step of a new model, compiled anew for Dynamo, and the warnings meanwhile."""
    torch._dynamo.reset()
    compiled = torch.compile(Sharded(), backend="qpass", options={"comm": policy})
    patch = torch._functorch.config.patch(enable_autograd_cache=caches)
    with warnings.catch_warnings(record=True) as warned, patch:
        warnings.simplefilter("always")
        compiled(torch.randn(8, 64)).backward()
    messages = [str(warning.message) for warning in warned]
    return qpass.report(compiled), [message for message in messages if "comm" in message or "qpass" in message]


def test_a_cache_that_serves_the_graphs_serves_their_decisions() -> None:
    policy = PLAIN.override("bf16", backward=True, min_bytes=0).keep_plain(module="haed")
    counters.clear()
    report, warned = step(policy)
    told = [(row.collective, row.direction, row.module, row.sent_as, row.reason) for row in report.transfers]
    small = "bytes are fewer than the policy's min_bytes of 1,099,511,627,776"
    assert told == [
        ("all_reduce", "forward", "", "", f"2,048 {small}"),
        ("all_gather", "forward", "head", "", f"10,240 {small}"),
        ("reduce_scatter", "backward", "head", "all_to_all of bf16, summed", "10,240 -> 5,120 bytes"),
    ]
    (note,) = report.notes
    assert note == "override 1 (module='haed') of comm matches no collective (did you mean 'head'?)"
    assert warned == [note]
    assert counters["inductor"]["fxgraph_cache_miss"] == 2
    again, warned_again = step(policy)
    assert counters["aot_autograd"]["autograd_cache_hit"] == 1
    assert (again.transfers, again.notes, warned_again) == (report.transfers, report.notes, warned)
    again, warned_again = step(policy, caches=False)
    assert counters["inductor"]["fxgraph_cache_hit"] == 4
    assert (again.transfers, again.notes, warned_again) == (report.transfers, report.notes, warned)
    assert not [name for name in counters["inductor"] if "qpass" in name]


def test_a_recording_sees_the_passes_over_a_graph_that_a_cache_has() -> None:
    step(PLAIN)
    counters.clear()
    with qpass.record() as passes:
        step(PLAIN)
    assert [found.name for found in passes].count("insert_codecs") == 2  # forward, backward


def test_what_is_missed_is_said_again_too() -> None:
    policy = Policy("int8", kinds="all_reduce", min_bytes=0)
    missed = "qpass left collectives uncompressed:\n  all_reduce of {}: sent plain: a max cannot be taken over payloads"
    for _ in range(2):
        report, warned = step(policy)
        (row,) = report.missed
        assert row.reason == "a max cannot be taken over payloads"
        assert warned == [missed.format(row.place)]
    torch._dynamo.reset()
    model = Sharded()
    compiled = torch.compile(model, backend="qpass", options={"comm": policy})
    with pytest.warns(UserWarning, match="uncompressed"):
        compiled(torch.randn(8, 64))
    with pytest.raises(StrictError, match=r"1 operations are not what .* asked for\n.*forward all_reduce"):
        qpass.report(compiled, strict=True)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="wanted compressed and are not: 1"):
        torch.compile(Sharded(), backend="qpass", options={"comm": policy, "strict": True})(torch.randn(8, 64))


def test_codecs_are_calls_unless_the_policy_has_them_fused() -> None:
    model, x = Sharded().requires_grad_(False), torch.randn(8, 64)
    for fuse in (False, True):
        torch._dynamo.reset()
        comm = Policy("int8", kinds="all_gather", min_bytes=0, fuse=fuse)
        with torch._inductor.config.patch(force_disable_caches=True):
            _, (code,) = run_and_get_code(torch.compile(model, backend="qpass", options={"comm": comm}), x)
        for name in ("encode", "decode"):
            assert (f"torch.ops.qpass.{name}.default(" in code) is not fuse


def test_where_no_graph_has_a_collective_the_hooks_are_named() -> None:
    said = []
    for hits in (0, 1):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(nn.Linear(4, 4), backend="qpass", options={"comm": "int8"})
        with warnings.catch_warnings(record=True) as warned:
            y = compiled(torch.randn(2, 4)).sum()
            before = len(warned)
            y.backward()
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
        assert (before, len(warned)) == (hits, 1)  # of what is compiled anew, the backward graph may have some
        said += [str(warned[0].message), *qpass.report(compiled).notes]
    assert len(set(said)) == 1
    assert "FSDP2 to qpass.comm.compress_fsdp" in said[0]
    inference = torch.compile(nn.Linear(4, 4).requires_grad_(False), backend="qpass", options={"comm": "int8"})
    with pytest.warns(UserWarning, match=r"no collective\n.*\n.*register_comm_hook"):
        inference(torch.randn(2, 4))


def test_20_mutations_and_no_stale_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each changes what the graph depends on, and so is compiled anew; what was changed back is served again."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y

    def misses(policy: Policy, **options: Any) -> int:
        torch._dynamo.reset()
        counters.clear()
        torch.compile(function, backend="qpass", options={"comm": policy, **options})(torch.ones(8))
        found, served = (counters["inductor"][f"fxgraph_cache_{which}"] for which in ("miss", "hit"))
        assert found + served == 1
        return found

    link = Link(1e6, 1e-4, 1e9, 1e9)
    source = tmp_path / "rule.py"
    source.write_text("1")
    sources = list(module._sources())
    monkeypatch.setattr(module, "_sources", lambda: [*sources, str(source)])
    codecs = ("int8:64:bf16", "int8:128:fp32", "int4", "mxint8", "fp8_e4m3", "bf16")
    mutations: list[Policy] = [Policy(name, min_bytes=1 << 40) for name in codecs]
    mutations += [replace(PLAIN, kinds=kinds) for kinds in ("all_gather", ("all_reduce", "all_gather"))]
    mutations += [replace(PLAIN, link=link), replace(PLAIN, link=replace(link, latency=0.0))]
    mutations += [replace(PLAIN, min_bytes=1 << 41)]
    mutations += [PLAIN.override("int4", backward=True), PLAIN.override("int4", backward=False, min_bytes=1 << 40)]
    mutations += [PLAIN.keep_plain(kind="all_reduce"), PLAIN.keep_plain(kind="all_reduce", min_bytes=1)]
    assert [misses(policy) for policy in (PLAIN, PLAIN, *mutations, PLAIN)] == [1, 0, *[1] * len(mutations), 0]
    assert [misses(PLAIN, strict=True), misses(PLAIN, strict=True)] == [1, 0]
    for text in ("2", "3"):
        source.write_text(text)
        get_hash_for_files.cache_clear()  # as in a new process
        assert [misses(PLAIN), misses(PLAIN)] == [1, 0]
    for world in (3, 4):
        start(world)
        assert [misses(PLAIN), misses(PLAIN)] == [1, 0]
    assert len(mutations) + 5 == 20
    start(2)
    source.write_text("1")
    get_hash_for_files.cache_clear()
    assert misses(PLAIN) == 0


class Named(nn.Module):
    """Sums over the ranks, in a module of a name that is given."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, Summed())
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return funcol.all_reduce(x * self.scale, "sum", dist.group.WORLD)


def test_programs_that_differ_in_the_names_of_modules_alone() -> None:
    policy = PLAIN.keep_plain(module="head", min_bytes=0)
    for name, reason in (("head", "leaves it plain"), ("tail", "are fewer than the policy's min_bytes")):
        torch._dynamo.reset()
        model = Named(name)
        compiled = torch.compile(model, backend="qpass", options={"comm": policy})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(torch.ones(8))
        (row,) = qpass.report(compiled).transfers
        assert (row.module, reason in row.reason) == (name, True)


@pytest.mark.parametrize("strict", [False, True])
def test_compute_over_dtensors_stays_in_float_and_its_sums_are_compressed(strict: bool) -> None:
    mesh = init_device_mesh("cpu", (2,))
    model = parallelize_module(nn.Sequential(nn.Linear(64, 64)).requires_grad_(False), mesh, {"0": RowwiseParallel()})
    options = {"config": "int8_dynamic", "comm": PLAIN, "strict": strict}
    compiled = torch.compile(model, backend="qpass", options=options)
    if strict:
        with pytest.raises(BackendCompilerFailed, match="its tensors are of DTensor"):
            compiled(torch.randn(8, 32))
        return
    with pytest.warns(UserWarning, match="left a compiled graph in float: its tensors are of DTensor"):
        compiled(torch.randn(8, 32))
    assert [row.collective for row in qpass.report(compiled).transfers] == ["all_reduce"]


def test_a_function_is_reported_past_its_graph_breaks() -> None:
    def function(x: Tensor) -> Tensor:
        dist.all_reduce(x)
        torch._dynamo.graph_break()
        y = x * 2
        dist.all_reduce(y)
        return y

    compiled = torch.compile(function, backend="qpass", options={"comm": {"codec": "int8", "kinds": "all_gather"}})
    with pytest.raises(InputError, match="no graph of qpass yet"):
        qpass.report(compiled)
    compiled(torch.ones(8, 64))
    report = qpass.report(compiled)
    assert report.stage == "compiled"
    assert [row.collective for row in report.transfers] == ["all_reduce"] * 2
    assert str(report).splitlines()[:3] == [
        "qpass report: compiled, 2 graphs",
        "  operations  left in floating point",
        "  collectives 0 of 2 compressed",
    ]
    assert str(report).count("the policy names all_gather only") == 2
    assert report.to_dict()["transfers"][0]["collective"] == "all_reduce"


def test_what_inductors_own_schedule_switches_off_is_in_the_report_and_in_what_a_cache_has() -> None:
    counters.clear()
    policy = PLAIN.override("bf16", backward=True, min_bytes=0)
    said = (
        "Inductor schedules the collectives (bucket_all_gathers_fx='all'), so qpass sends each payload whole: it does "
        "not split large ones, does not join small ones, and does not resolve symbolic sizes"
    )
    assert step(policy)[0].notes == ()
    with torch._inductor.config.patch(bucket_all_gathers_fx="all"):
        assert step(policy)[0].notes == (said,)
        assert step(policy)[0].notes == (said,)
        assert counters["aot_autograd"]["autograd_cache_hit"] == 1
        assert step(PLAIN)[0].notes == ()  # nothing is sent as a payload
