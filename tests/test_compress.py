"""Compressed collectives as a function on a traced graph and as a pass of Inductor's: records, strictness, caches."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import _functional_collectives as funcol
from torch.testing._internal.distributed.fake_pg import FakeStore

import lockstep as send
import qpass
from lockstep import lockstep, text, traced, value
from qpass import compress as module
from qpass.backend import qpass_backend
from qpass.comm import Policy, codec
from qpass.compress import UNSEEN, CompressCollectives, collectives, compress
from qpass.errors import ConfigError, InputError, StrictError
from qpass.graph.record import GraphRecord

ALL = Policy("int8", min_bytes=0)


@pytest.fixture
def group_of_two() -> Iterator[None]:
    """A process group whose other rank is pretended: graphs are those of two ranks, and nothing is sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def mixed(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return send.all_reduce(x), send.all_reduce(x, "max"), send.all_gather(x.long())


def test_a_graph_that_somebody_traced() -> None:
    inputs = [(value(rank, 4, 50),) for rank in range(2)]
    gm = traced(lambda x: send.all_reduce(x) * 2, *inputs[0])
    assert compress(gm, ALL) is gm
    int8 = codec("int8")
    expected = 2 * sum(int8.decode(int8.encode(x), 200) for (x,) in inputs).view(4, 50)
    assert all(torch.equal(result, expected) for result in lockstep(gm, inputs))
    once = text(gm)
    compress(gm, ALL)
    assert text(gm) == once


def test_every_collective_is_accounted_for() -> None:
    gm = compress(traced(mixed, value(0, 4, 50)), ALL)
    assert [(record.op, record.outcome, record.kernel, record.reason) for record in collectives(gm)] == [
        ("all_reduce", "lowered", "all_gather of int8:128:bf16, summed", "800 -> 260 bytes"),
        ("all_reduce", "float", "", "a max cannot be taken over payloads"),
        ("all_gather", "float", "", "values of int64 travel as they are"),
    ]


def test_what_is_cast_after_the_gather_is_not_rounded_before_it() -> None:
    def gathered(dtype: torch.dtype) -> Any:
        return lambda x: torch.ops.prims.convert_element_type(send.all_gather(x), dtype)

    inputs = [(value(rank, 4, 64),) for rank in range(2)]
    gm = traced(gathered(torch.float8_e4m3fn), *inputs[0])
    before = lockstep(gm, inputs)
    compress(gm, ALL)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(lockstep(gm, inputs), before, strict=True))
    assert [record.reason for record in collectives(gm)] == ["1,024 -> 256 bytes"]
    gm = compress(traced(gathered(torch.bfloat16), *inputs[0]), ALL)
    assert [record.reason for record in collectives(gm)] == ["512 -> 260 bytes"]  # of bfloat16
    gm = compress(traced(gathered(torch.bfloat16), *inputs[0]), "int8")
    assert [record.reason for record in collectives(gm)] == ["1,024 -> 512 bytes"]  # too small to be int8


def test_strict_raises_for_what_was_wanted_and_not_done() -> None:
    with pytest.raises(StrictError) as raised:
        compress(traced(mixed, value(0, 4, 50)), ALL, strict=True)
    assert str(raised.value) == (
        "collectives that are wanted compressed and are not: 1\n"
        "  where: block (all_reduce_1), model.py:7: y = send(x): "
        "all_reduce: a max cannot be taken over payloads\n"
        "  to do: name other kinds in the policy, or compile without strict=True"
    )
    compress(traced(mixed, value(0, 4, 50)), Policy("int8", kinds="all_gather"), strict=True)  # sums are not wanted


def test_a_compilation_without_collectives_names_the_hooks() -> None:
    gm = traced(lambda x: x + 1, value(0, 4))
    training = CompressCollectives(ALL, graphs=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training(gm.graph)  # the backward graph may have some
    with pytest.warns(UserWarning, match=r"no collective\n.*\n.*register_comm_hook.*compress_fsdp"):
        training(gm.graph)
    inference = CompressCollectives(ALL)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inference(traced(send.all_reduce, value(0, 4)).graph)


def test_a_compilation_warns_of_what_was_wanted_and_not_done() -> None:
    record = GraphRecord()
    missed = "all_reduce of block: sent plain: a max cannot be taken over payloads"
    with pytest.warns(UserWarning, match=f"qpass left collectives uncompressed:\n  {missed}$"):
        CompressCollectives(ALL, record=record)(traced(mixed, value(0, 4, 50)).graph)
    assert [(found.op, found.outcome, found.reason) for found in record.collectives] == [
        ("all_reduce", "lowered", "800 -> 260 bytes"),
        ("all_reduce", "float", "a max cannot be taken over payloads"),
        ("all_gather", "float", "values of int64 travel as they are"),
    ]


def test_a_recording_sees_the_passes_over_a_graph() -> None:
    with qpass.record() as passes:
        compress(traced(mixed, value(0, 4, 50)), ALL)
    assert [(found.name, found.changes) for found in passes] == [
        ("lower_collectives", 0), ("insert_codecs", 1), ("lower_collectives", 1)
    ]  # fmt: skip
    sent = passes["lower_collectives"].diff
    assert (sent.before.sent_bytes, sent.after.sent_bytes) == (800 + 800 + 1600, 260 + 800 + 1600)


@pytest.mark.parametrize("config", [None, pytest.param("int8_dynamic", marks=pytest.mark.slow)], ids=["float", "int8"])
def test_the_report_of_a_compiled_model_says_what_it_sends(group_of_two: None, config: str | None) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 32)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.linear(x)
            dist.all_reduce(y)
            return y, funcol.all_reduce(x, "max", dist.group.WORLD)

    options = {"comm": Policy("int8", min_bytes=2048), "config": config}
    with qpass.record() as passes, torch.no_grad(), warnings.catch_warnings(record=True) as warned:
        model = torch.compile(Summed(), backend="qpass", options=options)
        model(torch.randn(16, 64))
    assert sum("a max cannot be taken over payloads" in str(warning.message) for warning in warned) == 1
    assert passes["insert_codecs"].changes == 1
    report = qpass.report(model)
    assert (report.sent(), report.sent("lowered")) == (2, 1)
    assert "  collectives 1 of 2 compressed\n" in str(report)
    assert "all_gather of int8:128:bf16, summed 2,048 -> 520 bytes" in str(report)
    assert "sent plain x1: a max cannot be taken over payloads" in str(report)
    assert UNSEEN not in report.notes
    assert [row.op for row in report.missed if row.sent] == ["all_reduce"]


def test_a_report_admits_what_the_cache_hides() -> None:
    record = GraphRecord()
    compiling = CompressCollectives(ALL, graphs=2, record=record)
    assert record.notes == [UNSEEN] * 2  # none is compiled yet
    compiling(traced(send.all_reduce, value(0, 4)).graph)
    assert record.notes == [UNSEEN]


def test_the_backend_says_so_too() -> None:
    compiled = torch.compile(nn.Linear(4, 4).requires_grad_(False), backend="qpass", options={"comm": "int8"})
    with pytest.warns(UserWarning, match="no collective"):
        compiled(torch.randn(2, 4))


def test_the_cache_key_holds_all_that_a_graph_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def uuid(policy: Any = ALL, **options: Any) -> str:
        return CompressCollectives(policy, **options).uuid()

    known = {uuid()}
    assert uuid(Policy("int8", min_bytes=0)) in known
    for other in ("int4", "int8:64:bf16", "mxint8"):
        known.add(uuid(Policy(other, min_bytes=0)))
    known |= {uuid(Policy("int8", min_bytes=1)), uuid(Policy("int8", "all_reduce", 0)), uuid(strict=True)}
    monkeypatch.setattr(module, "group_sizes", lambda: {"0": 2})
    known.add(uuid())
    monkeypatch.setattr(module, "group_sizes", lambda: {"0": 3})
    known.add(uuid())
    monkeypatch.setattr(torch, "__version__", "9.9")
    known.add(uuid())
    monkeypatch.setattr(module, "get_hash_for_files", lambda paths: hashlib.sha256(repr(paths).encode()).digest())
    known.add(uuid())
    assert len(known) == 11


def test_the_cache_key_reads_every_source_of_qpass() -> None:
    names = {Path(path).name for path in module._sources()}
    assert {"compress.py", "insert_codecs.py", "all_reduce.py", "wire_kernels.py", "policy.py", "transfer.py"} <= names


def test_wrong_policies_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"no codec 'int9' \(did you mean 'int8'"):
        qpass.backend(comm="int9")
    with pytest.raises(ConfigError, match=r"No collective is named 'all_reduc' \(did you mean 'all_reduce'"):
        Policy("int8", kinds=("all_reduc",))
    with pytest.raises(ConfigError, match="A graph has one seed for all its calls"):
        Policy("int8:128:bf16:stochastic")
    with pytest.raises(InputError, match=r"comm is a codec, its name or a qpass\.comm\.Policy, not int"):
        qpass.backend(comm=8)
    with pytest.raises(ConfigError, match=r"unknown option 'com' \(did you mean 'comm'"):
        qpass_backend(traced(lambda x: x, value(0, 4)), [], options={"com": "int8"})


def test_equal_settings_are_equal_backends() -> None:
    assert qpass.backend(comm="int8") == qpass.backend(comm=Policy(codec("int8")))
    assert qpass.backend(comm="int8").config is None
    assert qpass.backend("int8_dynamic", comm="int8").config == qpass.backend().config
