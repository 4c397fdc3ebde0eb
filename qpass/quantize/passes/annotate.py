"""Decide, from the catalogue and the configuration, which edges are quantized; nothing is changed but ``meta``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from qpass import torch_private
from qpass.arithmetic.numerics import dtype_name
from qpass.errors import ConfigError
from qpass.ir.constants import Constants
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.record import FUSED_INTO, NodeRecord, describe, record_of, set_record
from qpass.ir.rule import NotAsked, Refusal, require
from qpass.ir.source import module_stack, where
from qpass.ir.text import target_name
from qpass.islands.float_weights import FloatWeights, is_matrix, reads, works_by_element
from qpass.islands.island import BATCH_NORM, IslandMatch
from qpass.islands.views import carried
from qpass.patterns import CARRIED, CATALOGUE, KEPT_IN_FLOAT, OF_WEIGHTS
from qpass.spec import PerChannel, PerGroup, QuantizationSpec
from qpass.spec.config import Config, Resolved
from qpass.targets import Target
from qpass.torch_private import tree_leaves

EDGES = "qpass_edges"
"""``meta`` key on a consumer: {source node: spec}, read and removed by ``insert_observers``."""
FOLD = "qpass_fold"
"""``meta`` key on a batch norm that ``convert`` folds into the convolution before it."""
ISLAND = "qpass_island"
"""``meta`` key on every node of an island that runs quantized."""


@dataclass(frozen=True)
class Annotate(Pass):
    """For each island of the catalogue: ``meta`` says which operands get which spec, or the record says why not.

    Operations outside every island get a record too, so that the report accounts for the whole graph. It finds a
    `Seen`: the names that overrides could have matched in this region, and the overrides that did. ``weights`` are
    counted over all regions, each once.
    """

    config: Config
    target: Target
    weights: FloatWeights = field(default_factory=FloatWeights, compare=False)

    def run(self, gm: fx.GraphModule) -> PassResult:
        constants, seen = Constants(gm), Seen()
        taken = {node for node in gm.graph.nodes if ISLAND in node.meta}
        count = 0
        for dependent in (False, True):
            for node in gm.graph.nodes:
                if node.op == "call_function" and node not in taken:
                    count += self._visit(node, dependent, constants, taken, seen)
        for node in gm.graph.nodes:
            if node.op == "call_function" and node not in taken and node not in constants:
                seen.resolve(self.config, node)
                if record_of(node) is None and computes_floats(node):
                    set_record(node, uncovered(node))
        self._account(gm, constants, seen)
        return PassResult(count, found=(seen,))

    def _visit(self, node: fx.Node, dependent: bool, constants: Constants, taken: set[fx.Node], seen: Seen) -> int:
        for island in self.target.islands(CATALOGUE):
            if (type(island) in self.target.only_behind) != dependent:
                continue
            fusions = self.target.fusions(island) or {()}
            refused: Refusal | None = None
            for m in island.matches(node, fusions | {(BATCH_NORM, *fusion) for fusion in fusions}, taken):
                try:
                    specs = self._decide(m, constants, seen)
                except Refusal as refusal:
                    refused = refusal
                    continue
                mark(m, specs)
                taken.update(m.nodes)
                return 1
            if refused is not None:
                asked = not isinstance(refused, NotAsked) and not dependent
                set_record(node, describe(node, "float", island.name, reason=refused.reason).but(asked=asked))
        return 0

    def _account(self, gm: fx.GraphModule, constants: Constants, seen: Seen) -> None:
        """Say of each operation how many bytes of weights it reads in float, and why where no pattern covers it."""
        self.weights.count(gm)
        for read in reads(gm, constants):
            node = read.reader
            if read.source in node.meta.get(EDGES, ()) or FOLD in node.meta:
                continue
            kept, record = self.weights.take(gm, read), record_of(node)
            if record is None:
                continue
            record = record.but(float_bytes=record.float_bytes + kept)
            if record.outcome == "float" and not record.pattern and is_matrix(gm, read) and not works_by_element(node):
                record = self._without_pattern(node, record, seen)
            set_record(node, record)

    def _without_pattern(self, node: fx.Node, record: NodeRecord, seen: Seen) -> NodeRecord:
        """The record of an operation that would have been quantized, had it a pattern."""
        if node.target in OF_WEIGHTS:
            record = record.but(reason=OF_WEIGHTS[node.target])
        elif isinstance(node.target, torch_private.HigherOrderOperator):
            record = record.but(reason=CARRIED)
        elif node.target in KEPT_IN_FLOAT:
            return record
        resolved = seen.resolve(self.config, node)
        if resolved.weight is None:
            return record.but(reason=override_reason(resolved))
        return record.but(asked=True)

    def _decide(self, m: IslandMatch, constants: Constants, seen: Seen) -> dict[str, QuantizationSpec]:
        island = m.island
        resolved = seen.resolve(self.config, m.root, island.name)
        specs = wanted_specs(m, resolved)
        if not specs:
            raise NotAsked(override_reason(resolved))
        for _, fused in m.epilogues:
            own = seen.resolve(self.config, fused.root)
            if own.override_index != resolved.override_index and own.activation is None and own.weight is None:
                raise NotAsked(override_reason(own))
        result = m.root.meta["val"].dtype
        operands = {m.captures[name].meta["val"].dtype for name in specs}
        cast = operands == {torch.float32} and result in (torch.bfloat16, torch.float16)
        require(not cast, f"torch.autocast in the model computes it in {dtype_name(result)}, and float32 is quantized")
        dtypes = operands | {result}
        complex_ones = sorted(dtype_name(dtype) for dtype in dtypes if dtype.is_complex)
        require(not complex_ones, f"it computes in {', '.join(complex_ones)}, and complex numbers are not quantized")
        others = sorted(map(dtype_name, dtypes - {torch.float32}))
        require(not others, f"it computes in {', '.join(others)}; float32 is quantized: model.float() makes it so")
        island.check(m, constants)
        before = self.target.only_behind.get(type(island))
        if before is not None:
            sources = [m.captures[name] for name in m.operands]
            stands = all(behind_island(source, before.name, self.target) for source in sources)
            require(stands, f"pays only where a quantized {before.name} stands before it")
        self.target.kernel_for(m, specs)
        return specs


@dataclass
class Seen:
    """What the overrides were held against, in one region or, joined, in a whole model."""

    overrides: set[int] = field(default_factory=set)
    paths: dict[str, str] = field(default_factory=dict)
    ops: set[str] = field(default_factory=set)

    def resolve(self, config: Config, node: fx.Node, island: str = "") -> Resolved:
        """The specs for an operator, or for the island that it is the root of, noting the override that gave them."""
        names = [name for name in (island, target_name(node), str(node.target)) if name]
        self.note(node, names)
        resolved = config.resolve(module_stack(node), *names)
        if resolved.override_index is not None:
            self.overrides.add(resolved.override_index)
        return resolved

    def join(self, other: Seen) -> None:
        """Add what was seen elsewhere."""
        self.overrides |= other.overrides
        self.paths |= other.paths
        self.ops |= other.ops

    def note(self, node: fx.Node, ops: Iterable[str]) -> None:
        """Remember the names that an override could have meant."""
        self.paths.update((path, kind if isinstance(kind, str) else kind.__name__) for path, kind in module_stack(node))
        self.ops.update(ops)


def wanted_specs(m: IslandMatch, resolved: Resolved) -> dict[str, QuantizationSpec]:
    """The spec of each quantizable operand; a weight's channel axis is the operand's own."""
    specs = {}
    for name, operand in m.operands.items():
        spec = {"activation": resolved.activation, "weight": resolved.weight}.get(operand.role)
        if spec is None:
            continue
        if operand.role == "weight" and isinstance(spec.granularity, PerChannel):
            spec = replace(spec, granularity=PerChannel(operand.axis))
        if isinstance(spec.granularity, PerGroup):
            check_groups(m, m.captures[name], spec.granularity.group_size)
        specs[name] = spec
    if any(o.role == "weight" for o in m.operands.values()) and resolved.weight is None:
        return {}  # rounding activations alone would lose precision and gain no kernel
    return specs


def check_groups(m: IslandMatch, w: fx.Node, group_size: int) -> None:
    """Raise ConfigError where the rows of a matrix cannot be cut into groups; other weights have no groups at all."""
    shape = w.meta["val"].shape
    if len(shape) == 2 and shape[-1] % group_size:
        raise ConfigError(
            f"the group size {group_size} does not divide the last dimension of the weight {list(shape)}",
            where=where(m.root),
            hint=f"choose a group size that divides {shape[-1]}, or leave this module in float with "
            "config.keep_float(module=...)",
        )


def override_reason(resolved: Resolved) -> str:
    """Why an island got no spec at all."""
    if resolved.override_index is not None:
        return f"override {resolved.override_index} of the configuration leaves it in float"
    return "the configuration quantizes none of its operands"


def mark(m: IslandMatch, specs: dict[str, QuantizationSpec]) -> None:
    """Write the decision into the graph."""
    for name, spec in specs.items():
        source = m.captures[name]
        for node in m.nodes:
            if source in node.all_input_nodes:
                node.meta.setdefault(EDGES, {})[source] = spec
    for node in m.nodes:
        node.meta[ISLAND] = m.island.name
    if m.batch_norm is not None:
        m.batch_norm.root.meta[FOLD] = True
    set_record(m.root, describe(m.root, "quantized", m.island.name))
    for _, fused in m.epilogues:
        set_record(fused.root, describe(fused.root, "quantized", m.island.name, reason=f"{FUSED_INTO}{m.root.name}"))


def behind_island(source: object, name: str, target: Target) -> bool:
    """Whether a value comes from a quantized island ``name``, or from one that ``target`` quantizes only behind it."""
    followers = {island.name for island, before in target.only_behind.items() if before.name == name}
    while isinstance(source, fx.Node):
        found = source.meta.get(ISLAND)
        if found is not None:
            return found == name or found in followers
        inputs = carried(source)
        source = inputs[0] if len(inputs) == 1 else None
    return False


def computes_floats(node: fx.Node) -> bool:
    """Whether an operation has floating-point results; sizes, indices and checks of inputs are nobody's loss."""
    leaves = tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in leaves)


def uncovered(node: fx.Node) -> NodeRecord:
    """The record of an operation that no island covers."""
    if carried(node):
        return describe(node, "exact")
    return describe(node, "float", reason=KEPT_IN_FLOAT.get(node.target, "no pattern of the catalogue covers it"))
