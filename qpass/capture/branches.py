"""Random draws of training alone (stochastic depth, noise), as calls of `Branch` in the trace of evaluation.

A branch is what the training trace holds between one value and what is read in its place::

    evaluation   add(x, v)
    training     add(x, mul(v, bernoulli_(new_empty(v, ...), 0.9)))
    together     add(x, branch_0(v))         branch_0: v in evaluation, the product in training
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import torch
from torch import fx, nn

from qpass import torch_private
from qpass.capture.alignment import Alignment
from qpass.errors import CaptureError
from qpass.ir.alias import aliased_inputs, written_inputs
from qpass.ir.attributes import get_constant, owner_of
from qpass.ir.branch import Branch
from qpass.ir.editor import INHERITED, Editor
from qpass.ir.module import GraphModule
from qpass.ir.source import where
from qpass.ir.text import target_name

aten = torch.ops.aten

OTHER = "the model computes something else in training than in evaluation: {} is in one mode only, or on other operands"

STATISTICS = (aten.batch_norm.default, aten.instance_norm.default)


def insert_branches(
    gm: fx.GraphModule, trains: fx.GraphModule, drawn: Collection[fx.Node], finish: Callable[[fx.Node], None]
) -> tuple[dict[fx.Node, fx.Node], dict[fx.Node, fx.Node]]:
    """Insert what only ``trains`` draws into ``gm``. Returns the twins of its operators and the draw of each new call.

    Args:
        gm: the trace in evaluation; edited.
        trains: the trace in training, of the same symbolic sizes; both have the flags of evaluation.
        drawn: the nodes of ``trains`` that draw random numbers.
        finish: gives a node of ``trains`` the flags that it has in training.

    Raises:
        CaptureError: training does something else, or a branch is not one; see :func:`check`.
    """
    found = Alignment(gm, trains, drawn)
    if found.fault is not None:
        raise refusal(OTHER, found.fault)
    branches = found.branches()
    check(trains, branches, found, drawn)
    edit = Editor(gm, "capture")
    ours = dict(found.back)
    ends: dict[fx.Node, fx.Node] = {}  # the last call put behind a node of gm
    drawing: dict[fx.Node, fx.Node] = {}
    behind = next(iter(gm.graph.nodes))
    for node in trains.graph.nodes:
        behind = found.back.get(node, behind)
        if node not in branches:
            continue
        value, like = found.replaced[node], next((n for n in branches[node] if n in drawn), node)
        for inner in branches[node]:
            finish(inner)
        values = {source for source in ours if value in (found.replaced.get(source), ours[source])}
        body, operands = cut_out(branches[node], values)
        for operand in operands:
            if operand not in ours:
                ours[operand] = constant(operand, trains, edit)
        name = edit.numbered("branch")
        gm.add_module(name, Branch(GraphModule(nn.Module(), body)))
        with gm.graph.inserting_after(ends.get(behind, behind)):
            call = gm.graph.call_module(name, tuple(ours[operand] for operand in operands))
        call.meta = {key: like.meta[key] for key in INHERITED if key in like.meta} | {"val": value.meta["val"]}
        ours[node] = ends[behind] = call
        drawing[call] = like
    for reader, roots in found.reads.items():
        replace_reads(reader, [None if root is None else ours[root] for root in roots])
    return found.twin, drawing


def check(
    trains: fx.GraphModule, branches: Mapping[fx.Node, list[fx.Node]], found: Alignment, drawn: Collection[fx.Node]
) -> None:
    """Raise CaptureError where training does something outside of branches, or something that a branch may not do.

    No branch writes to what it did not make, updates statistics or holds control flow; no two draw one number; and they
    draw in the order of their places, or the model's seed would mean something else.
    """
    owner: dict[fx.Node, fx.Node] = {}
    for root, nodes in branches.items():
        for node in nodes:
            effect = node in drawn or bool(written_inputs(node))
            if effect and node in owner:
                raise refusal("{} is drawn in training only, and changes two values", node)
            owner[node] = root
            if any(not is_own(source, nodes) for source in written_inputs(node)):
                raise refusal("{} overwrites in training a value that evaluation leaves as it is", node)
            if node.target in STATISTICS or isinstance(node.target, torch_private.HigherOrderOperator):
                raise refusal("{} runs in training only, with a random draw", node)
    place = {node: index for index, node in enumerate(trains.graph.nodes)}
    latest = -1
    for node in trains.graph.nodes:
        if node not in found.back and node not in owner and (node in drawn or written_inputs(node)):
            raise refusal(OTHER, node)
        if node in drawn:
            now = place[owner.get(node, node)]
            if now < latest:
                raise refusal("{} follows a random draw whose value is used after it, in training only", node)
            latest = now


def is_own(node: fx.Node, nodes: list[fx.Node]) -> bool:
    """Whether the memory of a node is that of ``nodes`` alone."""
    return node in nodes and all(is_own(source, nodes) for source in aliased_inputs(node))


def refusal(what: str, node: fx.Node) -> CaptureError:
    """The error about a node of the training trace; ``{}`` in ``what`` stands for its operator."""
    return CaptureError(
        what.format(target_name(node)), where=where(node),
        hint="training may drop, normalise by the batch, and draw a random mask or noise in the place where one value "
        "is changed by it; leave everything else to the training loop, and prepare what both modes share",
    )  # fmt: skip


def cut_out(nodes: list[fx.Node], values: Collection[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of ``nodes``, whose last is its result, and what it reads; first the last of ``values`` among them."""
    inside = set(nodes)
    operands = list(dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside))
    value = [operand for operand in operands if operand in values][-1]
    operands = [value, *(operand for operand in operands if operand is not value)]
    graph = fx.Graph()
    copies = {operand: graph.placeholder(f"x_{index}") for index, operand in enumerate(operands)}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].meta = {key: node.meta[key] for key in INHERITED if key in node.meta}
    graph.output(copies[nodes[-1]])
    return graph, operands


def constant(node: fx.Node, trains: fx.GraphModule, edit: Editor) -> fx.Node:
    """The constant of a branch, which is a literal of the forward's code, in the graph of evaluation."""
    first = next(iter(edit.graph.nodes))
    name = str(node.target).rpartition(".")[2]
    made = edit.constant(name, get_constant(trains, str(node.target)), like=node, before=first)
    owner, leaf = owner_of(edit.gm, str(made.target))
    owner._non_persistent_buffers_set.add(leaf)
    return made


def replace_reads(reader: fx.Node, reads: list[fx.Node | None]) -> None:
    """Replace what a node reads; ``reads`` has an entry for each node among its arguments, None for those that stay."""
    given = iter(reads)
    reader.args, reader.kwargs = fx.node.map_arg((reader.args, reader.kwargs), lambda node: next(given) or node)
