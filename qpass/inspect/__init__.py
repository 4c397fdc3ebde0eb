"""Reports, diffs, recordings and noise of graphs. Nothing here changes a graph."""

from qpass.inspect.diff import GraphDiff, diff
from qpass.inspect.ranges import ranges
from qpass.inspect.record import Recording, record
from qpass.inspect.report import Report, report, report_graphs
from qpass.inspect.sqnr import sqnr
from qpass.inspect.values.report_data import Row

__all__ = [
    "GraphDiff", "Recording", "Report", "Row", "diff", "ranges", "record", "report", "report_graphs", "sqnr",
]  # fmt: skip
