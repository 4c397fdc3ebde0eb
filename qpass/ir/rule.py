"""Rules, refusals and the walk that applies them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from qpass import torch_private
from qpass.ir.constants import Constants
from qpass.ir.editor import Editor, erase_dead
from qpass.ir.expression import Expr
from qpass.ir.match import Match, Matcher


class Refusal(Exception):
    """A rule declines a match; the reason is for people, the node is where it was decided."""

    def __init__(self, reason: str, node: fx.Node | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node


def require(condition: object, why_not: str, node: fx.Node | None = None) -> None:
    """Refuse with a reason unless the condition holds."""
    if not condition:
        raise Refusal(why_not, node)


class Rule:
    """One rewrite ``before -> after``. The first line of the docstring states it."""

    def pattern(self, *captures: Any) -> Expr | Iterable[Expr]:
        """The expression that the rule rewrites; the parameters are the captures."""
        raise NotImplementedError

    def check(self, m: Match, constants: Constants) -> None:
        """Refuse matches that the rule does not hold for, by :func:`require`."""

    def rewrite(self, m: Match, edit: Editor) -> fx.Node:
        """Build the replacement of ``m.root`` before it and return it."""
        raise NotImplementedError

    @property
    def law(self) -> str:
        """The rewrite in one line."""
        return (type(self).__doc__ or "").strip().splitlines()[0]

    @property
    def name(self) -> str:
        """The rule's name in counts and messages."""
        return type(self).__name__

    def matcher(self) -> Matcher:
        """The compiled pattern, built once per rule object."""
        if "_matcher" not in self.__dict__:
            self.__dict__["_matcher"] = Matcher(self.pattern)
        return self.__dict__["_matcher"]


@dataclass
class Applied:
    """What a walk did: how often each rule fired, and each refusal as (rule, node, reason)."""

    fired: Counter[str] = field(default_factory=Counter)
    refused: list[tuple[str, fx.Node, str]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The number of rewrites."""
        return sum(self.fired.values())

    @property
    def nearest_miss(self) -> str:
        """The refusal to print when nothing fired: the last one, which got furthest into the graph."""
        if not self.refused:
            return "no rule matched"
        rule, node, reason = self.refused[-1]
        return f"{rule} declined {node.name}: {reason}"


def apply_rules(gm: fx.GraphModule, rules: Sequence[Rule], pass_name: str) -> Applied:
    """One walk in topological order, each node tried against the rules rooted at its operator, first match wins.

    Linear in the graph. Rewritten roots are replaced everywhere and erased together with the inputs that only they
    used; a rule that moves an operation downstream is met again further down the same walk.
    """
    by_root: dict[torch_private.OpOverload, list[Rule]] = defaultdict(list)
    for rule in rules:
        for op in rule.matcher().roots:
            by_root[op].append(rule)
    applied = Applied()
    constants = Constants(gm)
    edit = Editor(gm, pass_name)
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        for rule in by_root.get(node.target, ()):
            m = rule.matcher().match(node)
            if m is None:
                continue
            try:
                rule.check(m, constants)
            except Refusal as refusal:
                applied.refused.append((rule.name, refusal.node or node, refusal.reason))
                continue
            replacement = rule.rewrite(m, edit)
            node.replace_all_uses_with(replacement)
            erase_dead(gm.graph, reversed(m.nodes))
            applied.fired[rule.name] += 1
            break
    return applied


class NotAsked(Refusal):
    """The configuration itself leaves the operation in float."""
