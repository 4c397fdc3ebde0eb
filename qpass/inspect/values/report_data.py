"""What a report holds: one row for each operation and each collective, and the sizes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One operation of the model.

    ``outcome`` is "quantized" (its operands carry q/dq pairs), "lowered" (``kernel`` runs it), "float" (``reason``
    says why), "exact" (moves values without rounding) or "unaccounted" (a pass lost its record: a defect of that
    pass). ``compute_dtype`` is the dtype of what stays in float. ``count`` is the number of operations that were
    merged into this one, itself included. A ``fused`` row is part of another row's island and counted there.
    ``missed``: the configuration asked for more than was done. ``float_bytes`` are those of the weights that it reads
    in floating point, in the float model; a weight that several operations read counts at the first.
    """

    op: str
    module: str
    outcome: str
    kernel: str = ""
    reason: str = ""
    pattern: str = ""
    compute_dtype: str = ""
    line: str = ""
    node: str = ""
    count: int = 1
    fused: bool = False
    missed: bool = False
    float_bytes: int = 0


@dataclass(frozen=True)
class Transfer:
    """One collective of a compiled graph.

    ``direction`` is "forward" or "backward". ``sent_as`` names what goes instead, ``""`` where it is sent plain;
    ``reason`` then says why, and else the bytes before and after. ``missed``: the policy wanted it compressed.
    """

    collective: str
    direction: str
    module: str = ""
    line: str = ""
    group: str = ""
    sent_as: str = ""
    reason: str = ""
    missed: bool = False

    @property
    def place(self) -> str:
        """The module around it, or where none is known the user's line."""
        return self.module or self.line or "(unknown)"


@dataclass(frozen=True)
class ReportData:
    """Everything that is known about one graph, or about the graphs of one model.

    ``bytes_before`` are those of the float model's parameters and
    buffers, ``bytes_after`` those of the constants that the graphs read now: a prepacked weight counts a byte a value,
    the codes it was packed from count only where something else still reads them. ``weight_bytes`` are those of the
    float model's floating-point constants that it does not write to, ``weight_bytes_kept`` those among them that
    operations read in floating point: ``kept_share`` is their part. ``leftover`` counts the q/dq
    operations in the graphs: once lowered, those that Inductor fuses into their neighbours. ``sqnr`` is in dB, None
    where no reference was given. ``transfers`` are the collectives of what was compiled with ``comm``; ``stage`` is
    "compiled" where no compute was lowered beside them.
    """

    stage: str
    target: str
    rows: tuple[Row, ...]
    bytes_before: int
    bytes_after: int
    leftover: dict[str, int]
    notes: tuple[str, ...] = ()
    sqnr: float | None = None
    graphs: int = 1
    transfers: tuple[Transfer, ...] = ()
    weight_bytes: int = 0
    weight_bytes_kept: int = 0

    @property
    def kept_share(self) -> float:
        """The part of the weights' bytes that stays in floating point, 0 to 1; 0 where there are no weights."""
        return self.weight_bytes_kept / self.weight_bytes if self.weight_bytes else 0.0

    def count(self, *outcomes: str) -> int:
        """The number of operations with one of these outcomes; of all but the exact ones when none is named."""
        wanted = outcomes or ("quantized", "lowered", "float", "unaccounted")
        return sum(row.count for row in self.rows if row.outcome in wanted and not row.fused)

    @property
    def missed(self) -> tuple[Row | Transfer, ...]:
        """The operations and collectives for which the configuration asked for more than was done."""
        every: list[Row | Transfer] = [*self.rows, *self.transfers]
        return tuple(row for row in every if row.missed)

    def to_dict(self) -> dict[str, Any]:
        """The report in dicts, lists, strings and numbers, as JSON takes them; an infinite SQNR becomes a string."""
        plain = asdict(self) | {"rows": [asdict(row) for row in self.rows], "notes": list(self.notes)}
        plain["transfers"] = [asdict(transfer) for transfer in self.transfers]
        plain["kept_share"] = self.kept_share
        if self.sqnr is not None and math.isinf(self.sqnr):
            plain["sqnr"] = str(self.sqnr)
        return plain
