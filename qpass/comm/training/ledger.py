"""Ledger: what was sent for every bucket or unit, in which form, and why if not as codes."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass
class Entry:
    """The calls of one collective for one bucket or unit that went alike.

    Attributes:
        place: of DDP the bucket; of FSDP2 the module path.
        collective: ``"all_reduce"`` and the like.
        sent_as: the written form of the codec, ``""`` where it was sent plain; `reason` then says why.
        missed: compression was asked for, and it was not the caller's own options that declined it.
        calls: how many there were.
        plain_bytes, bytes: of this rank: what a plain collective sends at best, and what was sent.
    """

    place: str
    collective: str
    sent_as: str = ""
    reason: str = ""
    missed: bool = False
    calls: int = 0
    plain_bytes: int = 0
    bytes: int = 0


class Ledger:
    """Entries of one rank, in the order in which they were first made."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str, str], Entry] = {}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Copies of all entries."""
        return tuple(replace(entry) for entry in self._entries.values())

    def add(
        self, place: str, collective: str, sent: int, plain: int, sent_as: str = "", why: Declined | None = None
    ) -> None:
        """Count a call that sent `sent` bytes instead of `plain` ones."""
        reason, missed = (why.reason, why.missed) if why else ("", False)
        made = Entry(place, collective, sent_as, reason, missed)
        entry = self._entries.setdefault((place, collective, sent_as, reason), made)
        entry.calls += 1
        entry.plain_bytes += plain
        entry.bytes += sent


@dataclass(frozen=True)
class Declined:
    """Why something is sent plain; `missed` unless the caller's own options say so."""

    reason: str
    missed: bool = True


DECLINED_BY_LINK = Declined("by the link's figures it would not be faster compressed", missed=False)
WARM_UP = Declined("a step of the warm-up", missed=False)
SPARSE = Declined("the gradient is sparse")
