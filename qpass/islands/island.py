"""Islands: a float operation with quantizable operands, and the operations that a kernel may run behind it.

An island is written once, in its float form. Its q/dq form is *derived*: the same expression, with each quantizable
operand read through the dequantize node in front of it. ``prepare`` matches the float form to place observers,
``lower`` matches the derived form to place kernels, so the two cannot drift apart.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from qpass.ir.constants import Constants
from qpass.ir.expression import Expr
from qpass.ir.match import Match, Matcher
from qpass.islands.qdq import SYMMETRIC_CHOICES, QParams, as_dequantize, cast_of
from qpass.spec import QuantizationSpec

BATCH_NORM = "batch_norm"
Role = Literal["activation", "weight", "float"]


@dataclass(frozen=True)
class Operand:
    """What may be quantized at an edge; ``axis`` is the output-channel axis of a weight."""

    role: Role
    axis: int = 0


ACTIVATION = Operand("activation")
FLOAT = Operand("float")


def WEIGHT(axis: int) -> Operand:
    """A stored weight whose output channels lie along ``axis``."""
    return Operand("weight", axis)


@dataclass(frozen=True)
class Epilogue:
    """An operation that a kernel can run on its result; ``pattern``'s first parameter ``y`` is that result."""

    name: str
    pattern: Callable[..., Expr | Iterable[Expr]]
    operands: Mapping[str, Operand] = field(default_factory=dict, hash=False)
    matcher: Matcher = field(init=False, hash=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "matcher", Matcher(self.pattern))


class IslandMatch(Match):
    """An island found in a graph; ``epilogues`` are the fused operations in order, ``output`` the last node."""

    def __init__(self, island: Island, core: Match, epilogues: tuple[tuple[Epilogue, Match], ...]) -> None:
        nodes = core.nodes + tuple(node for _, m in epilogues for node in m.nodes)
        captures = dict(core.captures)
        for _, m in epilogues:
            captures.update({name: value for name, value in m.captures.items() if name != "y"})
        super().__init__(core.root, nodes, captures)
        self.island = island
        self.epilogues = epilogues

    @property
    def fused(self) -> tuple[str, ...]:
        """The names of the fused operations, batch norm aside: it is folded before a kernel sees the island."""
        return tuple(epilogue.name for epilogue, _ in self.epilogues if epilogue.name != BATCH_NORM)

    @property
    def batch_norm(self) -> Match | None:
        """The batch norm to fold, when there is one."""
        return next((m for epilogue, m in self.epilogues if epilogue.name == BATCH_NORM), None)

    @property
    def output(self) -> fx.Node:
        """The node whose value the island produces."""
        return self.epilogues[-1][1].root if self.epilogues else self.root

    @property
    def operands(self) -> dict[str, Operand]:
        """All operands of the core and of the fused operations that are there (an absent bias is not)."""
        found = dict(self.island.operands)
        for epilogue, _ in self.epilogues:
            found.update(epilogue.operands)
        return {name: operand for name, operand in found.items() if isinstance(self.captures.get(name), fx.Node)}


Specs = Mapping[str, QuantizationSpec]


class Island:
    """Base of the catalogue's compute patterns; the first line of the docstring is the law."""

    operands: ClassVar[Mapping[str, Operand]] = {}
    epilogues: ClassVar[tuple[Epilogue, ...]] = ()
    name: ClassVar[str]

    def pattern(self, *captures: Any) -> Expr | Iterable[Expr]:
        """The float expression; the parameters are the captures."""
        raise NotImplementedError

    def check(self, m: IslandMatch, constants: Constants) -> None:
        """Refuse, with a reason, what no target can run quantized."""

    def matcher(self) -> Matcher:
        """The compiled pattern, built once per island object."""
        if "_matcher" not in self.__dict__:
            self.__dict__["_matcher"] = Matcher(self.pattern)
        return self.__dict__["_matcher"]

    def matches(self, node: fx.Node, fusions: Iterable[tuple[str, ...]], taken: Any = ()) -> Iterator[IslandMatch]:
        """The island rooted at ``node`` with each allowed chain of fused operations behind it, the longest first."""
        core = self.matcher().match(node)
        if core is None or any(n in taken for n in core.nodes) or _takes_a_number(self.operands, core):
            return
        allowed = set(fusions)
        chain: list[tuple[Epilogue, Match]] = []
        lengths = [0] if () in allowed else []
        current = node
        while len(current.users) == 1:
            user = next(iter(current.users))
            step = None if user in taken else self._step(user, current)
            names = (*(epilogue.name for epilogue, _ in chain), step[0].name) if step else ()
            if step is None or not any(fusion[: len(names)] == names for fusion in allowed):
                break
            chain.append(step)
            if names in allowed:
                lengths.append(len(chain))
            current = user
        for length in reversed(lengths):
            yield IslandMatch(self, core, tuple(chain[:length]))

    def _step(self, user: fx.Node, current: fx.Node) -> tuple[Epilogue, Match] | None:
        for epilogue in self.epilogues:
            found = epilogue.matcher.match(user, {"y": current})
            if found is None or _takes_a_number(epilogue.operands, found):
                continue
            if list(user.all_input_nodes).count(current) == 1:
                others = [value for name, value in found.captures.items() if name != "y"]
                if current not in others:
                    return epilogue, found
        return None


def _takes_a_number(operands: Iterable[str], m: Match) -> bool:
    """Whether an operand is a number that the graph is given or computes: a factor that a call brings, a size."""
    values = [m.captures[name].meta.get("val") for name in operands if isinstance(m.captures.get(name), fx.Node)]
    return any(isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)) for value in values)


def quantized_operands(m: IslandMatch) -> dict[str, QParams]:
    """The derived form: for each operand fed by a dequantize node (through a cast at most), its parameters."""
    found = {}
    for name in m.operands:
        pair = as_dequantize(m.captures[name])
        if pair is not None:
            found[name] = pair.qparams
    return found


def codes_of(m: IslandMatch, name: str) -> fx.Node:
    """The codes behind a quantized operand."""
    pair = as_dequantize(m.captures[name])
    assert pair is not None, f"{name} is not quantized"
    return pair.value


def spec_of(qparams: QParams, constants: Constants) -> QuantizationSpec:
    """The spec that these parameters follow: dynamic when a scale is computed in the graph."""
    scale, zero_point = qparams.scale, qparams.zero_point
    dynamic = isinstance(scale, fx.Node) and scale not in constants
    if not isinstance(zero_point, fx.Node):
        symmetric = zero_point in (0, None)
    elif zero_point in constants:
        symmetric = not bool(constants.value(zero_point).any())
    else:
        symmetric = qparams_op(zero_point) in SYMMETRIC_CHOICES
    return QuantizationSpec(
        dtype=qparams.dtype, granularity=qparams.granularity, symmetric=symmetric, dynamic=dynamic,
        quant_min=qparams.quant_min, quant_max=qparams.quant_max,
    )  # fmt: skip


def qparams_op(node: fx.Node) -> Any:
    """The operator that chose a dynamic scale or zero point (through the ``getitem`` of its result)."""
    source = node.args[0] if node.target is operator.getitem else node
    return source.target if isinstance(source, fx.Node) else None


def uncast(node: fx.Node) -> fx.Node:
    """``node`` without a cast to float32 around it: kernels read bfloat16 operands as they are."""
    inner = cast_of(node, torch.float32)
    return node if inner is None else inner
