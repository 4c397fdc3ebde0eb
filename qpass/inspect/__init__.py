"""Looking at a graph and at what quantization did to it; nothing here changes either."""

from qpass.inspect.operations import Row
from qpass.inspect.report import Report, report, report_graphs
from qpass.inspect.sqnr import sqnr

__all__ = ["Report", "Row", "report", "report_graphs", "sqnr"]
