"""The pipeline that brings a captured graph into plain form, by the steps of `normalize` and `region_edits`."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from qpass.ir import normalize as steps
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.module import rebuild
from qpass.ir.pipeline import Pipeline
from qpass.ir.region_edits import Types, inline_set_grad, sink_constants
from qpass.ir.regions import regions


@dataclass(frozen=True)
class InlineSetGrad(Pass):
    """``wrap_with_set_grad_enabled(mode, region, *operands)  ->  the nodes of region``; exact"""

    trains: bool = False
    whole = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(inline_set_grad(gm, self.trains))


@dataclass(frozen=True)
class SinkConstants(Pass):
    """``cond(p, a, b, (x, weight))  ->  cond(p, a, b, (x,))``, where a and b read ``weight`` by ``get_attr``; exact"""

    types: Types | None = field(default=None, hash=False)
    whole = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(sink_constants(gm, self.types))


@dataclass(frozen=True)
class FunctionalizeInplace(Pass):
    """``relu_(x); use(x)  ->  y = relu(x); use(y)`` where nobody can tell the difference; exact"""

    whole = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(steps.functionalize_inplace(gm))


@dataclass(frozen=True)
class DropNoops(Pass):
    """``dropout(x, p, train=False)  ->  x``, and so for every operator that returns the values of its input; exact"""

    trains: bool = False
    whole = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(steps.drop_noops(gm, self.trains))


@dataclass(frozen=True)
class EliminateDead(Pass):
    """``y = sin(x); return x  ->  return x``: nodes that no result depends on are erased; exact"""

    whole = True

    def run(self, gm: fx.GraphModule) -> PassResult:
        return PassResult(steps.eliminate_dead(gm))


def normalization_pipeline(types: Types | None = None, trains: bool = False) -> Pipeline:
    """The passes from a fresh trace to a captured graph in plain form, each exact."""
    passes = (InlineSetGrad(trains), SinkConstants(types), FunctionalizeInplace(), DropNoops(trains), EliminateDead())
    return Pipeline("captured", passes, foreign=True)


def normalize(gm: fx.GraphModule, types: Types | None = None, trains: bool = False) -> fx.GraphModule:
    """A graph module around ``gm``'s own graph, in plain form, that holds just what the graph still reads.

    ``types`` maps module paths to module types, for the nodes of regions (see :func:`sink_constants`). ``trains``:
    gradients stop where the model stops them.
    """
    normalization_pipeline(types, trains).run(gm)
    for region in regions(gm):
        if region is not gm:
            region.recompile()
    return rebuild(gm)
