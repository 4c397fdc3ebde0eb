"""The report of a model: what became of every operation, and why, for a person or for a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor, fx

from qpass import torch_private
from qpass.backend.compilations import Compilation, compilations, program_of
from qpass.backend.compiled_collectives import CompiledCollectives, conclusions
from qpass.capture.export import CAPTURE_KEY, FirstBatch
from qpass.errors import InputError, StrictError
from qpass.inspect.operations import operations
from qpass.inspect.render.report_html import html
from qpass.inspect.render.report_text import render
from qpass.inspect.sent import SENDERS, Sender, SentReport, sent_report
from qpass.inspect.sqnr import sqnr
from qpass.inspect.transfers import transfers
from qpass.inspect.values.report_data import ReportData, Row, Transfer
from qpass.ir.attributes import get_constant
from qpass.ir.record import GRAPH_KEY, GraphRecord
from qpass.ir.regions import regions
from qpass.ir.text import target_name
from qpass.islands.qdq import DEQUANTIZE, QUANTIZE


@dataclass(frozen=True)
class Report(ReportData):
    """Everything that is known about one graph, or about the graphs of one model.

    :class:`ReportData` has its content. ``str(report)`` is its text, stable over runs; a notebook shows it as HTML.
    """

    def __str__(self) -> str:
        return render(self)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": str(self), "text/html": html(self)}


@overload
def report(gm: Sender, *, strict: bool = False) -> SentReport: ...


@overload
def report(
    gm: Any, inputs: Any = None, reference: Callable[..., Any] | None = None, strict: bool = False
) -> Report: ...


def report(
    gm: Any, inputs: Any = None, reference: Callable[..., Any] | None = None, strict: bool = False
) -> Report | SentReport:
    """What is quantized, lowered to which kernel, left in float or unfused, and why; sizes before and after.

    Args:
        gm: a prepared, quantized or lowered graph, a model prepared without inputs that has seen a batch, or a model
            or function compiled with ``backend="qpass"`` that ran. Also a DDP hook of `qpass.comm`, or the value of
            `compress_fsdp`: then a :class:`~qpass.inspect.sent.SentReport` says what was sent for each bucket or unit.
        inputs: with ``reference``, the batches to measure the SQNR on, as :func:`qpass.sqnr` takes them.
        reference: the model to compare with, usually the float one.
        strict: raise when the configuration asked for more than was done.

    Raises:
        InputError: ``gm`` holds no decisions, or only one of ``inputs`` and ``reference`` is given.
        CaptureError: ``gm`` was prepared without inputs and has seen no batch yet.
        StrictError: ``strict`` and some operation is not what the configuration asked for.
    """
    if isinstance(gm, SENDERS) and inputs is None and reference is None:
        return sent_report(gm, strict)
    if (inputs is None) != (reference is None):
        given, lacking = ("inputs", "reference") if reference is None else ("reference", "inputs")
        raise InputError(f"report was given {given} but no {lacking}", hint="SQNR needs both, the rest needs neither")
    graphs, collectives, sizes = _compiled(gm)
    found = report_graphs(graphs, collectives, strict, sizes)
    return found if reference is None else replace(found, sqnr=sqnr(reference, gm, inputs))


def report_graphs(
    graphs: Sequence[fx.GraphModule], collectives: Sequence[CompiledCollectives] = (), strict: bool = False,
    sizes: _Sizes | None = None,
) -> Report:  # fmt: skip
    """One report on all of ``graphs``, and on what compilations decided; raises as :func:`report` does.

    ``sizes`` are those of the float model, where they are not the sums over the graphs.
    """
    records = [_record(gm) for gm in graphs]
    sizes = sizes or _Sizes.total(map(_Sizes.of, records))
    parts = [(region, record) for gm, record in zip(graphs, records, strict=True) for region in regions(gm)]
    every_region = [region for region, _ in parts]
    notes = [note for gm in graphs for note in _notes(gm)] + conclusions(collectives)
    notes += [note for each in collectives for graph in each.graphs for note in graph.notes]
    found = Report(
        stage=", ".join(dict.fromkeys(record.stage for record in records)) or "compiled",
        target=", ".join(dict.fromkeys(record.target for record in records if record.target)),
        rows=tuple(row for region, record in parts for row in operations(region, record.stage, record.passes)),
        bytes_before=sizes.constants,
        bytes_after=constant_bytes(every_region),
        leftover=_leftover(every_region),
        notes=tuple(dict.fromkeys(notes)),
        graphs=len(graphs) or len(collectives),
        transfers=tuple(row for each in collectives for row in transfers(each.graphs)),
        weight_bytes=sizes.weights,
        weight_bytes_kept=sizes.kept,
    )
    if strict and found.missed:
        raise StrictError(
            f"{len(found.missed)} operations are not what the configuration asked for",
            where="\n         ".join(_missed(row) for row in found.missed),
            hint="accept that by config.keep_float(...), or ask for the report without strict=True",
        )
    return found


@dataclass(frozen=True, order=True)
class _Sizes:
    """Bytes of a float model: its constants, the weights among them, and those of the weights that stay in float."""

    constants: int = 0
    weights: int = 0
    kept: int = 0

    @classmethod
    def of(cls, record: GraphRecord) -> _Sizes:
        return cls(record.float_bytes, record.weight_bytes, record.weight_bytes_kept)

    @classmethod
    def total(cls, parts: Iterable[_Sizes]) -> _Sizes:
        columns = zip(*((part.constants, part.weights, part.kept) for part in [cls(), *parts]), strict=True)
        return cls(*map(sum, columns))


def constant_bytes(graphs: Iterable[fx.GraphModule]) -> int:
    """Bytes of all tensors that the graphs read as constants; tensors at one address count once, as the largest."""
    sizes: dict[tuple[str, int], int] = {}
    for gm in graphs:
        for node in gm.graph.find_nodes(op="get_attr"):
            value = get_constant(gm, str(node.target))
            if not isinstance(value, Tensor):
                continue
            plain = value.layout == torch.strided and value.device.type != "meta"
            place = ("address", value.data_ptr()) if plain and value.data_ptr() else ("object", id(value))
            size = value.numel() * (value.element_size() if value.layout == torch.strided else 1)
            sizes[place] = max(size, sizes.get(place, 0))
    return sum(sizes.values())


def _missed(row: Row | Transfer) -> str:
    if isinstance(row, Transfer):
        return f"{row.place} ({row.direction} {row.collective}): {row.reason}"
    return f"{row.module or row.node} ({row.op}): {row.reason}"


def _compiled(gm: Any) -> tuple[list[fx.GraphModule], list[CompiledCollectives], _Sizes | None]:
    if isinstance(gm, FirstBatch):
        return [gm.captured], [], None
    program = program_of(gm)
    if program is None:
        return [gm], [], None
    found = compilations(program)
    if not found and program is gm and GRAPH_KEY in getattr(gm, "meta", ()):
        return [gm], [], None  # a converted model, compiled in place, that has not run
    if not found:
        raise InputError("this compiled model has no graph of qpass yet", hint=_way_to_a_graph(program))
    graphs = [one.graph for one in found if one.graph is not None]
    return graphs, [one.collectives for one in found if one.collectives is not None], _sizes(program, found)


def _sizes(program: Any, found: Iterable[Compilation]) -> _Sizes:
    """Sizes of the float model behind compiled graphs: a converted one's record says them, else the graphs do.

    Graphs of one set of weights, as for other sizes of the inputs, count once.
    """
    record = program.meta.get(GRAPH_KEY) if isinstance(program, fx.GraphModule) else None
    if record is not None and record.float_bytes:
        return _Sizes.of(record)
    sizes: dict[object, _Sizes] = {}
    for one in found:
        if one.graph is not None:
            read = next(iter(one.weights), ())
            key = frozenset(read) if read else id(one)
            sizes[key] = max(sizes.get(key, _Sizes()), _Sizes.of(_record(one.graph)))
    return _Sizes.total(sizes.values())


def _way_to_a_graph(program: Any) -> str:
    modules = list(program.modules()) if isinstance(program, torch.nn.Module) else []
    record = program.meta.get(GRAPH_KEY) if isinstance(program, fx.GraphModule) else None
    if isinstance(record, GraphRecord) and record.stage == "prepared":
        return "it is prepared and not converted: call qpass.convert on it, compile the result and run that once"
    if any(isinstance(module, torch.nn.RNNBase) for module in modules) and not torch_private.dynamo_config.allow_rnn:
        return (
            "torch.compile skips what holds an nn.LSTM, nn.GRU or nn.RNN, and runs it as it is: set "
            "torch._dynamo.config.allow_rnn = True before it runs, or prepare and convert the model and compile that"
        )
    return (
        'compile it with torch.compile(model, backend="qpass") and run it once under torch.no_grad(); '
        "in training compute stays in float, and only what comm compresses is reported"
    )


def _record(gm: Any) -> GraphRecord:
    record: GraphRecord | None = gm.meta.get(GRAPH_KEY) if isinstance(gm, fx.GraphModule) else None
    if record is None or record.stage == "captured":
        kind = "a captured graph" if isinstance(gm, fx.GraphModule) else type(gm).__name__
        raise InputError(
            f"report takes a prepared, quantized or lowered graph, and this is {kind}",
            hint="call qpass.prepare on the model first",
        )
    return record


def _leftover(graphs: Iterable[fx.GraphModule]) -> dict[str, int]:
    names = [target_name(node) for gm in graphs for node in gm.graph.nodes if node.target in QUANTIZE | DEQUANTIZE]
    return dict(sorted(Counter(names).items()))


def _notes(gm: fx.GraphModule) -> Iterator[str]:
    yield from gm.meta[GRAPH_KEY].notes
    yield from gm.meta.get(CAPTURE_KEY, {}).get("notes", ())
