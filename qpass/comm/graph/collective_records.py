"""The records of the collectives of a compiled graph, kept inside the artifact that Inductor caches.

A cached graph is served without running a pass again, so records that a pass only logs would be lost. Inductor stores
with every compiled graph by how much each counter rose meanwhile. It raises the counters again whenever a cache serves
the graph: the FX graph cache, AOTAutograd's, or a remote one. So the records are kept as the name of a counter. They
are as old as the code that they describe, and so are the lines of the user's source in them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, fields

from qpass import torch_private
from qpass.ir.record import NodeRecord

PREFIX = "qpass collectives "
_SYMBOL = re.compile(r"\b[suz][a-z]*\d+\b")
_KEPT = [field.name for field in fields(NodeRecord) if field.name != "compute_dtype"]


@dataclass(frozen=True)
class CollectiveRecords:
    """The record of each collective of one compiled graph, in the order of the graph.

    ``overrides`` are those of the policy that are meant for such a graph, each with whether it met a collective, and a
    name near to what it says. ``notes`` are sentences about the whole graph.
    """

    backward: bool
    records: tuple[NodeRecord, ...] = ()
    overrides: tuple[tuple[str, bool, str], ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """One line a collective: what it is and where, how it is sent, and bytes or a reason."""
        direction = "backward " if self.backward else ""
        return [
            f"{direction}{r.op} of {r.module or r.line}: {r.kernel or 'sent plain'}: {r.reason}" for r in self.records
        ]

    def plans(self) -> dict[str, list[tuple[str, str]]]:
        """Name of a process group -> what its ranks must have decided alike: what goes, and its bytes or a reason.

        The latter is "" for an all_to_all, of which each rank may send other bytes, and where sizes are symbolic, as
        another rank may have compiled for a number.
        """
        found: dict[str, list[tuple[str, str]]] = {}
        for r in self.records:
            if r.group:
                differs = (r.op == "all_to_all" and r.outcome == "lowered") or _SYMBOL.search(r.reason)
                what = f"{r.op}: {r.kernel or 'sent plain'}"
                found.setdefault(r.group, []).append((what, "" if differs else r.reason))
        return found


def unmatched(graphs: Iterable[CollectiveRecords]) -> list[str]:
    """The overrides that met a collective in none of the graphs that they are meant for, with a name near to each."""
    hints: dict[str, str] = {}
    met = set()
    for name, is_met, hint in (override for graph in graphs for override in graph.overrides):
        hints[name] = hints.get(name) or hint
        met |= {name} if is_met else set()
    return [f"{name} of comm matches no collective{hint}" for name, hint in hints.items() if name not in met]


def keep(kept: CollectiveRecords) -> None:
    """Keep the records with the graph that is being compiled."""
    plain = {
        "backward": kept.backward,
        "records": [{name: getattr(record, name) for name in _KEPT} for record in kept.records],
        "overrides": kept.overrides,
        "notes": kept.notes,
    }
    torch_private.counters["inductor"][PREFIX + json.dumps(plain)] += 1


def take() -> list[CollectiveRecords]:
    """The records of the graphs that were compiled or served since the last call, in their order."""
    counters = torch_private.counters["inductor"]
    found = [name for name in counters if name.startswith(PREFIX)]
    return [_read(name) for name in found for _ in range(counters.pop(name))]


def _read(name: str) -> CollectiveRecords:
    plain = json.loads(name.removeprefix(PREFIX))
    records = tuple(NodeRecord(**record) for record in plain["records"])
    overrides = tuple((name, met, hint) for name, met, hint in plain["overrides"])
    return CollectiveRecords(plain["backward"], records, overrides, tuple(plain["notes"]))
