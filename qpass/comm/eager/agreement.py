"""Agreement of ranks: before a new kind of call every rank says what it is about to do, and all compare.

torch's transports abort the process on a payload of the wrong size, or read it as data. So the first call of its kind
on a group exchanges a header through the group's store. Data does not go that way, so no rank can mistake a payload for
a header. Later calls of the same kind exchange nothing.
"""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import torch.distributed as dist

from qpass.comm.eager.dead_ranks import dead_ranks
from qpass.comm.eager.group import Group
from qpass.errors import AgreementError, QpassError

_SAME_CALLS = "make the same calls in the same order on all ranks; qpass.comm.debug(True) compares every call"
WARNS_AFTER, PATIENCE = 10.0, 300.0
"""Seconds after which a silent rank is suspected of lacking these settings, and given up; torch waits half an hour."""

COMPILES_FOR = 60.0
"""Seconds that a rank may compile longer than others before they say that they wait for it."""

_SAME_PROGRAM = (
    "compile the same program with the same options on all ranks of the group; a policy with join=False is for groups "
    "whose ranks run different programs"
)

_MISSING = "Not all ranks made the call"

VERSION = 1
"""The version of payloads and schedules, raised with any change that gives the bytes another meaning."""


@dataclass(frozen=True)
class Silence:
    """What a silent rank may lack, and the seconds after which the others warn and give it up."""

    hint: str
    warns_after: float
    patience: float


@dataclass(frozen=True)
class Header:
    """A call, described by what must be equal on all ranks of the group. Sizes that may differ are left out."""

    collective: str
    codec: str
    numel: int
    dtype: str
    op: str = ""
    schedule: str = ""
    async_op: bool = False
    settings: str = ""


def agree(group: Group, header: Header, *, sends: list[int] | None = None, receives: list[int] | None = None) -> None:
    """Wait until all ranks have said the same. Later calls like this one on the group return at once.

    Args:
        sends, receives: for an all_to_all, how many elements go to and come from each rank; compared pair by pair.

    Raises:
        AgreementError: on every rank, where any two differ, or a rank refused, or one said nothing until the timeout.
    """
    if header in group.agreed and not debug():
        group.calls += 1
        return
    headers = _same_call(group, header, {"sends": sends, "receives": receives})
    if sends is not None:
        uneven = [
            f"rank {a} sends {headers[a]['sends'][b]} elements to rank {b}, which expects {headers[b]['receives'][a]}"
            for a in range(group.world)
            for b in range(group.world)
            if headers[a]["sends"][b] != headers[b]["receives"][a]
        ]
        if uneven:
            raise _error(header, group, "The splits do not fit each other", uneven)
    group.agreed.add(header)


def agree_on_plan(group: Group, plan: list[tuple[str, str]]) -> None:
    """Wait until all ranks have the same plan for the group: what each collective of a graph sends, and how much.

    How much is "" where a graph does not say it: that fits whatever the others have.

    Raises:
        AgreementError: on every rank, where two plans differ, or a rank said nothing until the timeout.
    """
    if dist.get_backend(group.process_group) == "fake":  # the other ranks are imagined
        return
    header = Header("compiled graph", codec="", numel=0, dtype="")
    silence = Silence(_SAME_PROGRAM, COMPILES_FOR, math.inf)
    plans = [said["plan"] for said in _same_call(group, header, {"plan": plan}, silence)]
    differing = [
        f"collective {place}: " + ", ".join(f"rank {rank} has {_line(entry)!r}" for rank, entry in enumerate(entries))
        for place, entries in enumerate(zip_longest(*plans, fillvalue=("none", "")))
        if len({what for what, _ in entries}) > 1 or len({much for _, much in entries if much}) > 1
    ]
    if differing:
        raise _error(header, group, "The ranks have compiled different plans", differing, _SAME_PROGRAM)


def _line(entry: Sequence[str]) -> str:
    return ": ".join(filter(None, entry))


def agree_on_settings(group: Group, header: Header, hint: str) -> None:
    """Wait until all ranks have said the same, even if they did before; ``hint`` is what silence may mean.

    Raises:
        AgreementError: on every rank, where two differ, or a rank said nothing for `PATIENCE` or until the timeout.
    """
    _same_call(group, header, {}, Silence(hint, WARNS_AFTER, PATIENCE))


def refuse(group: Group, why: QpassError) -> None:
    """Tell the ranks that may wait for this one's header that it will not make the call."""
    group.calls += 1
    if group.world > 1:
        _post(group, {"refused": why.what})


def debug(enabled: bool | None = None) -> bool:
    """Whether every call is compared, not only the first of its kind; `enabled` switches it, on all ranks alike.

    Decisions about the collectives of a compiled graph are compared before its first step in any case, unless the
    policy says ``join=False``; while this is on also then, and when a program is compiled again for other inputs.
    """
    global _debug
    if enabled is not None:
        _debug = enabled
    return _debug


_debug = False


def _same_call(
    group: Group, header: Header, more: dict[str, Any], absent: Silence | None = None
) -> list[dict[str, Any]]:  # fmt: skip
    """What every rank said, and ``more`` that it sent with it, where all are about to make the call of the header."""
    group.calls += 1
    said = {"version": VERSION, "order": group.calls, **asdict(header)}
    headers = _exchange(group, header, {"said": said, **more}, absent)
    refusals = {rank: header["refused"] for rank, header in enumerate(headers) if "refused" in header}
    if refusals:
        raise _error(
            header, group, "A rank refused the call", [f"rank {rank}: {why}" for rank, why in refusals.items()]
        )
    differing = [
        f"{field}: "
        + ", ".join(f"rank {rank} has {header['said'].get(field)!r}" for rank, header in enumerate(headers))
        for field in said
        if any(header["said"].get(field) != headers[0]["said"].get(field) for header in headers)
    ]
    if differing:
        raise _error(header, group, "The ranks do not make the same call", differing)
    return headers


def _exchange(group: Group, header: Header, sent: dict[str, Any], absent: Silence | None) -> list[dict[str, Any]]:
    number = _post(group, sent)
    keys = [f"{number}/{rank}" for rank in range(group.world)]
    try:
        _wait(group, header, number, absent)
        headers = [json.loads(group.store.get(key)) for key in keys]
    except AgreementError:  # which is a RuntimeError, too
        raise
    except RuntimeError as error:  # what all of torch's store errors are
        raise _error(header, group, f"The group's store is gone: {error}", []) from error
    if number > 1:  # everyone has answered, so everyone has read what came before
        group.store.delete_key(f"{number - 1}/{group.rank}")
    return headers


def _wait(group: Group, header: Header, number: int, absent: Silence | None) -> None:
    """Wait until all ranks have posted; ``absent`` is what to do about a rank that may never post.

    It asks repeatedly. A client of the store serves one thread at a time, so a thread that waited in it would keep the
    others from posting what other ranks wait for.
    """
    start = time.monotonic()
    pause, asks = 1e-4, start + 0.25  # when to ask for dead ranks
    timeout = group.timeout.total_seconds()
    ends = start + (min(timeout, absent.patience) if absent else timeout)
    warns = start + absent.warns_after if absent else math.inf
    while silent := [rank for rank in range(group.world) if not group.store.check([f"{number}/{rank}"])]:
        now = time.monotonic()
        if now >= asks:
            asks = now + min(now - start, 2.0)
            dead = dead_ranks(group.process_group, silent)
            if dead and not all(group.store.check([f"{number}/{rank}"]) for rank in dead):
                raise _error(header, group, _MISSING, [f"rank {rank} is gone: {why}" for rank, why in dead.items()])
        if absent and now >= warns:
            warns = ends
            note = f"{header.collective} waits for ranks {silent} of group {group.name!r} since {now - start:.0f} s"
            warnings.warn(f"{note}; if they have none, {absent.hint}", stacklevel=2)
        if now >= ends:
            details = [f"rank {rank} said nothing for {now - start:.0f} s" for rank in silent]
            raise _error(header, group, _MISSING, details, absent.hint if absent else _SAME_CALLS)
        time.sleep(pause)
        pause = min(1.5 * pause, 0.02)


def _post(group: Group, header: dict[str, Any]) -> int:
    group.agreements += 1
    try:
        group.store.set(f"{group.agreements}/{group.rank}", json.dumps(header))
    except RuntimeError as error:
        raise AgreementError(f"The group's store is gone: {error}", where=f"group {group.name!r}") from error
    return group.agreements


def _error(header: Header, group: Group, what: str, details: list[str], hint: str = _SAME_CALLS) -> AgreementError:
    ranks = dist.get_process_group_ranks(group.process_group)
    return AgreementError(
        f"{what}.\n    " + "\n    ".join(details),
        where=f"qpass.comm.{header.collective}, call {group.calls} on group {group.name!r} (global ranks {ranks})",
        hint=hint,
    )
