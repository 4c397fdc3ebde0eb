"""Compressed collectives as a function on a traced graph and as a pass of Inductor's: records, strictness, caches."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lockstep as send
import qpass
from lockstep import lockstep, text, traced, value
from qpass import torch_private
from qpass.backend import qpass_backend
from qpass.comm import Feedback, Policy, codec
from qpass.comm.graph import inductor_pass as module
from qpass.comm.graph.collective_records import take, unmatched
from qpass.comm.graph.compress import collectives, compress
from qpass.comm.graph.inductor_pass import CompressCollectives
from qpass.errors import ConfigError, InputError, StrictError

ALL = Policy("int8", min_bytes=0)


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


def test_an_override_that_matches_nothing_is_an_error_before_anything_is_done() -> None:
    gm = traced(mixed, value(0, 4, 50))
    before = text(gm)
    with pytest.raises(ConfigError) as raised:
        compress(gm, ALL.override("int4", module="blokc").override("int4", kind="all_gather").keep_plain(group="1"))
    assert str(raised.value) == (
        "Override 0 (module='blokc') matches no collective (did you mean 'block'?); "
        "override 2 (group='1') matches no collective\n  to do: correct the name, or remove the override"
    )
    assert text(gm) == before
    compress(gm, ALL.override("int4", backward=True))  # is meant for another graph
    with pytest.raises(ConfigError, match="Override 0"):
        compress(traced(lambda x: x + 1, value(0, 4)), ALL.override("int4", backward=True), backward=True)


def test_a_recording_sees_the_passes_over_a_graph() -> None:
    with qpass.record() as passes:
        compress(traced(mixed, value(0, 4, 50)), ALL)
    assert [(found.name, found.changes) for found in passes] == [
        ("lower_collectives", 0), ("insert_codecs", 1), ("lower_collectives", 1)
    ]  # fmt: skip
    sent = passes["lower_collectives"].diff
    assert (sent.before.sent_bytes, sent.after.sent_bytes) == (800 + 800 + 1600, 260 + 800 + 1600)


def test_the_pass_keeps_its_decisions_with_the_graph() -> None:
    take()
    policy = ALL.override("int4", module="block", kind="all_reduce").override("int4", group="tp", backward=False)
    CompressCollectives(policy)(traced(mixed, value(0, 4, 50)).graph)
    (decisions,) = take()
    assert decisions.lines() == [
        "all_reduce of block: all_gather of int4:32:bf16, summed: 800 -> 144 bytes",
        "all_reduce of block: sent plain: a max cannot be taken over payloads",
        "all_gather of block: sent plain: values of int64 travel as they are",
    ]
    assert decisions.plans()["0"][1] == ("all_reduce: sent plain", "a max cannot be taken over payloads")
    assert decisions.overrides == (
        ("override 0 (kind='all_reduce', module='block')", True, ""),
        ("override 1 (group='tp', backward=False)", False, ""),
    )
    assert unmatched([decisions]) == ["override 1 (group='tp', backward=False) of comm matches no collective"]
    assert take() == []


def test_the_cache_key_holds_all_that_a_graph_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def uuid(policy: Any = ALL, **options: Any) -> str:
        return CompressCollectives(policy, **options).uuid()

    known = {uuid()}
    assert uuid(Policy("int8", min_bytes=0)) in known
    for other in ("int4", "int8:64:bf16", "mxint8"):
        known.add(uuid(Policy(other, min_bytes=0)))
    known |= {uuid(Policy("int8", min_bytes=1)), uuid(Policy("int8", "all_reduce", 0)), uuid(strict=True)}
    known.add(uuid(Policy("int8", min_bytes=0, join=False)))
    known |= {uuid(ALL.keep_plain(module="head")), uuid(ALL.keep_plain(module="tail")), uuid(backward=True)}
    known |= {uuid(replace(ALL, feedback=Feedback())) for _ in range(2)}  # whichever: the graphs are the same
    monkeypatch.setattr(module, "groups", lambda: {"0": (2, "")})
    known.add(uuid())
    monkeypatch.setattr(module, "groups", lambda: {"0": (3, "")})
    known.add(uuid())
    monkeypatch.setattr(torch, "__version__", "9.9")
    known.add(uuid())
    digest: Any = lambda paths: hashlib.sha256(repr(paths).encode()).digest()  # noqa: E731
    monkeypatch.setattr(torch_private, "get_hash_for_files", digest)
    known.add(uuid())
    assert len(known) == 16


def test_the_cache_key_reads_every_source_of_qpass() -> None:
    names = {Path(path).name for path in module._sources()}
    assert {"compress.py", "insert_codecs.py", "all_reduce.py", "kernels.py", "policy.py", "transfer.py"} <= names


def test_wrong_policies_say_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"no codec 'int9' \(did you mean 'int8'"):
        qpass.backend(comm="int9")
    with pytest.raises(ConfigError, match=r"No collective is named 'all_reduc' \(did you mean 'all_reduce'"):
        Policy("int8", kinds=("all_reduc",))
    with pytest.raises(ConfigError, match="A graph has one seed for all its calls"):
        Policy("int8:128:bf16:stochastic")
    with pytest.raises(InputError, match=r"comm is a codec, its name, a qpass\.comm\.Policy or a dict .*, not int"):
        qpass.backend(comm=8)
    with pytest.raises(ConfigError, match=r"unknown option 'com' \(did you mean 'comm'"):
        qpass_backend(traced(lambda x: x, value(0, 4)), [], options={"com": "int8"})


def test_a_config_says_comm_as_well() -> None:
    assert qpass.backend(qpass.Config(comm="int8")) == qpass.backend(comm="int8")
    both = qpass.presets.int8_dynamic()
    assert qpass.backend(replace(both, comm="int4")) == qpass.backend(both, comm="int4")
    with pytest.raises(ConfigError, match="comm is given twice"):
        qpass.backend(qpass.Config(comm="int8"), comm="int4")
    with pytest.raises(ConfigError, match="Config comm cannot be a dict"):
        qpass.Config(comm={"codec": "int8"})
    with pytest.raises(ConfigError, match="comm is decided where a graph is compiled"):
        qpass.prepare(torch.nn.Linear(2, 2), (torch.ones(1, 2),), config=qpass.Config(comm="int8"))


def test_equal_settings_are_equal_backends() -> None:
    assert qpass.backend(comm="int8") == qpass.backend(comm=Policy(codec("int8")))
    assert qpass.backend(comm="int8").config is None
    assert qpass.backend("int8_dynamic", comm="int8").config == qpass.backend().config
