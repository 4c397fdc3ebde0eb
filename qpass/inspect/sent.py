"""The report of a DDP hook or of `compress_fsdp`: a row for every bucket or unit, with bytes and reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qpass.comm.training.ddp_hooks import DDPHook
from qpass.comm.training.fsdp import FSDPCompression
from qpass.errors import StrictError
from qpass.inspect.render.sent_table import html, text
from qpass.inspect.values.sent_data import SentData

Sender = DDPHook | FSDPCompression
SENDERS = (DDPHook, FSDPCompression)


@dataclass(frozen=True)
class SentReport(SentData):
    """What one rank has sent, and why some of it was sent plain. ``str(report)`` is its text.

    :class:`SentData` has its content.
    """

    def __str__(self) -> str:
        return text(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": html(self)}


def sent_report(sender: Sender, strict: bool = False) -> SentReport:
    """The report of a DDP hook, or of the value of `compress_fsdp`, on this rank.

    Raises:
        StrictError: ``strict`` and something was sent plain for another reason than the caller's options.
    """
    title = f"DDP hook, {sender.codec}" if isinstance(sender, DDPHook) else "compress_fsdp"
    found = SentReport(title, sender.entries)
    if strict and found.missed:
        raise StrictError(
            f"{len(found.missed)} collectives were sent plain though they were to be compressed",
            where="\n         ".join(f"{row.place} ({row.collective}): {row.reason}" for row in found.missed),
            hint="mend what the reasons say, or ask for the report without strict=True",
        )
    return found
