"""The rewrite engine: expression patterns with captures, refusals with reasons, one linear walk.

A rule is three functions with one vocabulary: ``pattern`` says which expression is meant (its parameters are the
captures), ``check`` refuses with a reason, ``rewrite`` builds the replacement.
"""

from qpass.rewrite.expression import Expr, aten, operators
from qpass.rewrite.match import Match, Matcher, normalized
from qpass.rewrite.rule import Applied, Refusal, Rule, apply_rules, require

__all__ = [
    "Applied", "Expr", "Match", "Matcher", "Refusal", "Rule", "apply_rules", "aten", "normalized", "operators",
    "require",
]  # fmt: skip
