"""The collectives of a compiled model by their records: one row each."""

from __future__ import annotations

from collections.abc import Iterable

from qpass.comm.graph.collective_records import CollectiveRecords
from qpass.inspect.values.report_data import Transfer


def transfers(graphs: Iterable[CollectiveRecords]) -> list[Transfer]:
    """The rows of compiled graphs, in their order."""
    return [
        Transfer(
            record.op, "backward" if graph.backward else "forward", record.module, record.line, record.group,
            record.kernel if record.outcome == "lowered" else "", record.reason, record.is_missed,
        )
        for graph in graphs for record in graph.records
    ]  # fmt: skip
