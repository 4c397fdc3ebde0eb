"""A report as HTML: the same headline, tables and reasons as its text, by the same rules as every page here."""

from __future__ import annotations

from qpass.inspect.render import page
from qpass.inspect.render.report_text import (
    explained,
    headline,
    per_module,
    per_operation,
    per_transfer,
    reasons,
    remarks,
)
from qpass.inspect.values.report_data import ReportData


def html(report: ReportData) -> str:
    """The static HTML of a report."""
    numbered = reasons(report)
    title, *figures = headline(report)
    name, _, rest = title.partition(":")
    rows = [(line[:14].strip(), line[14:].strip()) for line in figures]
    parts = [page.tag("p", page.tag("b", page.escape(name)), page.escape(rest)), page.pairs(rows)]
    operations = per_operation(report)
    if operations:
        header, *lines = operations
        parts.append(page.table(header, lines, numbers=range(1, len(header) - 1)))
    modules = per_module(report, numbered)
    if modules:
        header, *lines = modules
        table = page.table(header, lines)
        parts.append(page.details(page.escape(f"{len(lines)} kinds of places"), table, opened=len(lines) <= 30))
    if report.transfers:
        header, *lines = per_transfer(report.transfers)
        parts.append(page.table(header, lines))
    told = [*explained(report, numbered), *remarks(report)]
    parts += [page.tag("div", page.escape(line.strip())) for line in told]
    return page.block(*parts)
