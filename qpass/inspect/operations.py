"""The operations of a model by its graph: one row each, with the decision and its reason."""

from __future__ import annotations

import operator
import pkgutil
from collections.abc import Collection, Iterator

from torch import Tensor, fx

import qpass.comm.graph.passes
import qpass.quantize.passes
from qpass import torch_private
from qpass.arithmetic.numerics import dtype_name
from qpass.inspect.values.report_data import Row
from qpass.ir.constants import Constants
from qpass.ir.record import NodeRecord, Stage, record_of
from qpass.ir.source import module_path, source_line
from qpass.ir.text import target_name
from qpass.torch_private import tree_leaves

_FOLDERS = (*qpass.quantize.passes.__path__, *qpass.comm.graph.passes.__path__)
PASSES = {module.name for module in pkgutil.iter_modules(_FOLDERS)}
"""The passes of qpass, since a file is named by its pass; those of others are in the record of the graph."""

LOST = "a pass replaced it and did not carry its record over"
NOT_TRIED = "no pattern of the catalogue recognised its q/dq form, so no kernel was tried"


def operations(region: fx.GraphModule, stage: Stage, passes: Collection[str] = ()) -> Iterator[Row]:
    """The rows of one region. What passes inserted, and what only computes a constant, does not count.

    ``passes`` are the names of those that ran on the graph, beside qpass's own.
    """
    constants, passes = Constants(region), PASSES.union(passes)
    for node in region.graph.nodes:
        record = record_of(node)
        if record is None:
            if _computes_floats(node) and node not in constants and not _is_inserted(node, passes):
                place = {"module": module_path(node), "line": source_line(node), "node": node.name}
                yield Row(target_name(node), outcome="unaccounted", reason=LOST, missed=True, **place)
        elif record.outcome != "float" or record.float_bytes or _computes_floats(node) or node.op == "call_module":
            yield _row(node, record, stage)


def _row(node: fx.Node, record: NodeRecord, stage: Stage) -> Row:
    if stage == "lowered" and record.outcome == "quantized" and not record.reason:
        record = record.but(reason=NOT_TRIED)
    return Row(
        op=record.op, module=record.module, outcome=record.outcome, kernel=record.kernel, reason=record.reason,
        pattern=record.pattern, compute_dtype=_compute_dtype(node, record), line=record.line, node=node.name,
        count=record.size, fused=record.is_fused, missed=record.is_missed,
        float_bytes=record.float_bytes,
    )  # fmt: skip


def _compute_dtype(node: fx.Node, record: NodeRecord) -> str:
    if record.outcome != "float":
        return ""
    dtype = record.compute_dtype or next(t.dtype for t in _tensors(node) if t.is_floating_point())
    return dtype_name(dtype)


def _computes_floats(node: fx.Node) -> bool:
    """Whether a node is an operation of the model that could lose precision.

    q/dq nodes are not operations of the model. Masks, indices and sizes are not either; nor is ``getitem``,
    which names one result of the operation before it, nor control flow, whose regions are accounted for by themselves.
    """
    if node.op != "call_function" or node.target is operator.getitem or _is_control_flow(node):
        return False
    if isinstance(node.target, torch_private.OpOverload) and node.target.namespace == "quantized_decomposed":
        return False
    return any(tensor.is_floating_point() for tensor in _tensors(node))


def _tensors(node: fx.Node) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(node.meta.get("val")) if isinstance(leaf, Tensor)]


def _is_control_flow(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch_private.HigherOrderOperator) and not target.name().startswith("flex_attention")


def _is_inserted(node: fx.Node, passes: Collection[str]) -> bool:
    sources = node.meta.get("from_node") or ()
    return any(source.pass_name in passes for source in sources[-1:])
