"""A report as text: a headline, what happened per kind of operation and per module, and every reason once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from qpass.inspect.render.quantity import quantity
from qpass.inspect.render.table import table
from qpass.inspect.values.path_patterns import path_patterns
from qpass.inspect.values.report_data import ReportData, Row, Transfer

WORDS = {
    "lowered": "lowered",
    "quantized": "quantized",
    "float": "left in float",
    "exact": "exact",
    "unaccounted": "unaccounted",
}


def render(report: ReportData) -> str:
    """The text of a report; a reason is written out once, below, and referred to by its number."""
    numbered = reasons(report)
    tables = (per_operation(report), per_module(report, numbered), per_transfer(report.transfers))
    blocks = [headline(report), *(table(lines[0], lines[1:]) if lines else [] for lines in tables)]
    blocks += [explained(report, numbered), remarks(report)]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def headline(report: ReportData) -> list[str]:
    """The first lines: how much of the model is what, and the bytes of its constants."""
    total, lowered, quantized = report.count(), report.count("lowered"), report.count("quantized")
    is_lowered = "lowered" in report.stage
    done = f"{lowered} of {total} lowered to kernels" if is_lowered else f"{quantized} of {total} quantized"
    rest = [f"{quantized} quantized without a kernel"] if is_lowered and quantized else []
    rest += [f"{report.count('float')} left in float"]
    rest += [f"{n} unaccounted"] if (n := report.count("unaccounted")) else []
    moved, fused = report.count("exact"), sum(row.count for row in report.rows if row.fused)
    title = f"qpass report: {report.stage}"
    title += f" for {report.target}" if report.target else ""
    title += f", {report.graphs} graphs" if report.graphs > 1 else ""
    if report.stage == "compiled":
        return [title, "  operations  left in floating point", *_collectives(report)]
    lines = [title, f"  operations  {done}, {', '.join(rest)}"]
    besides = [f"{fused} fused into the one before"] if fused else []
    besides += [f"{moved} only move values"] if moved else []
    lines += [f"              besides, {' and '.join(besides)}"] if besides else []
    lines.append(f"  constants   {quantity(report.bytes_before)} -> {quantity(report.bytes_after)}{_percent(report)}")
    if report.weight_bytes:
        share = f"{100 * report.kept_share:.1f} % of their bytes stay in float"
        lines.append(f"  weights     {share} ({quantity(report.weight_bytes_kept)} of {quantity(report.weight_bytes)})")
    if report.sqnr is not None:
        lines.append(f"  SQNR        {report.sqnr:.1f} dB")
    return lines + _collectives(report)


def _collectives(report: ReportData) -> list[str]:
    compressed = sum(bool(row.sent_as) for row in report.transfers)
    return [f"  collectives {compressed} of {len(report.transfers)} compressed"] if report.transfers else []


def _percent(report: ReportData) -> str:
    return f" ({100 * report.bytes_after / report.bytes_before:.1f} %)" if report.bytes_before else ""


def per_operation(report: ReportData) -> list[list[str]]:
    """The rows of a table by operation, its header first."""
    outcomes = ["quantized", "lowered", "float", "exact"]
    outcomes += ["unaccounted"] if report.count("unaccounted") else []
    counts: dict[str, Counter[str]] = {}
    kernels: dict[str, dict[str, None]] = {}
    for row in report.rows:
        if not row.fused:
            counts.setdefault(row.op, Counter())[row.outcome] += row.count
            kernels.setdefault(row.op, {}).update({row.kernel: None} if row.kernel else {})
    lines = [
        [op, *(str(count[outcome] or "-") for outcome in outcomes), ", ".join(kernels[op])]
        for op, count in counts.items()
    ]
    return [["operation", *(WORDS[outcome] for outcome in outcomes), "kernel"], *lines] if lines else []


def per_module(report: ReportData, reasons: dict[tuple[str, str], int]) -> list[list[str]]:
    """The rows of a table by module path, its header first; reasons by their number."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    shows_bytes = any(map(_keeps_weights, report.rows))
    for row in report.rows:
        if (row.outcome == "exact" and not row.float_bytes) or row.fused:
            continue
        groups.setdefault((row.op, WORDS[row.outcome], _how(row, reasons)), []).append(row)
    lines: dict[str, list[list[str]]] = {}
    for (op, outcome, what), rows in groups.items():
        counts: Counter[str] = Counter()
        kept: Counter[str] = Counter()
        for row in rows:
            counts[row.module] += row.count
            kept[row.module] += row.float_bytes if _keeps_weights(row) else 0
        for pattern, paths in path_patterns(counts):
            count = sum(counts[path] for path in paths)
            name = (pattern or "(top level)") + (f" x{count}" if count > 1 else "")
            size = sum(kept[path] for path in paths)
            sizes = [quantity(size) if size else ""] if shows_bytes else []
            lines.setdefault(paths[0], []).append([name, op, outcome, *sizes, what])
    in_order = [line for path in dict.fromkeys(row.module for row in report.rows) for line in lines.get(path, [])]
    header = ["module", "operation", "outcome", *["float weights"] * shows_bytes, "kernel or reason"]
    return [header, *in_order] if in_order else []


def per_transfer(rows: Sequence[Transfer]) -> list[list[str]]:
    """The rows of a table, its header first; what is told of several collectives at one place is one row."""
    counts = Counter((row.place, row.direction, row.collective, row.sent_as or "plain", row.reason) for row in rows)
    lines = [
        [place + (f" x{count}" if count > 1 else ""), direction, collective, sent_as, reason]
        for (place, direction, collective, sent_as, reason), count in counts.items()
    ]
    return [["place", "graph", "collective", "sent as", "bytes, or why not"], *lines] if lines else []


def _keeps_weights(row: Row) -> bool:
    """Whether a row is shown with the bytes of its weights; a quantized one's are those of its bias."""
    return bool(row.float_bytes) and row.outcome in ("float", "exact") and not row.fused


def _how(row: Row, reasons: dict[tuple[str, str], int]) -> str:
    if row.outcome == "lowered":
        merged = f"{row.count} in one" if row.count > 1 else ""
        return " ".join(part for part in (row.kernel, row.reason, merged) if part)
    number = reasons.get((row.outcome, row.reason))
    return f"[{number}]" if number else ""


def reasons(report: ReportData) -> dict[tuple[str, str], int]:
    """(outcome, reason) -> number, for all that was not lowered, in order of appearance."""
    told = [(row.outcome, row.reason) for row in report.rows if row.reason and not row.fused]
    told = [reason for reason in told if reason[0] in ("float", "quantized", "unaccounted")]
    return {reason: number for number, reason in enumerate(dict.fromkeys(told), 1)}


def explained(report: ReportData, reasons: dict[tuple[str, str], int]) -> list[str]:
    """Every reason once."""
    counts: Counter[tuple[str, str]] = Counter()
    for row in report.rows:
        if not row.fused:
            counts[row.outcome, row.reason] += row.count
    words = WORDS | {"quantized": "quantized, no kernel"}
    lines = [f"  [{number}] {words[at[0]]} x{counts[at]}: {at[1]}" for at, number in reasons.items()]
    return ["reasons", *lines] if lines else []


def remarks(report: ReportData) -> list[str]:
    """The lines about the whole report."""
    dtypes: Counter[str] = Counter()
    for row in report.rows:
        if row.outcome == "float":
            dtypes[row.compute_dtype] += row.count
    lines = []
    if dtypes:
        lines.append(f"what stays in float computes in: {_counted(dtypes)}")
    if "lowered" in report.stage and report.leftover:
        lines.append(f"q/dq left in the graph, for Inductor to fuse: {_counted(report.leftover)}")
    return lines + [f"note: {note}" for note in report.notes]


def _counted(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x{count}" for name, count in counts.items())
