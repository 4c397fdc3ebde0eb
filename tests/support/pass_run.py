"""One pass over one graph, with everything checked that holds for every pass."""

from __future__ import annotations

from torch import Tensor, fx

from interpret import assert_true_vals, operators
from qpass.ir.graph_pass import Pass


def run_once(step: Pass, gm: fx.GraphModule, *inputs: Tensor) -> int:
    """Run ``step`` on ``gm`` as the frame does, and return the number of changes.

    Checked: the result is a valid graph; every ``val`` tells the truth; a new node knows the node and the pass that it
    comes from, and the user's line and modules; a second run changes nothing and says so.
    """
    old = set(gm.graph.nodes)
    step.requires(gm)
    count = step.run(gm).changed
    gm.graph.eliminate_dead_code()
    step.ensures(gm)
    gm.graph.lint()
    gm.recompile()
    for node in set(gm.graph.nodes) - old:
        (source,) = node.meta["from_node"]
        assert source.pass_name == step.name, f"{node} comes from {source.pass_name}"
        assert node.meta.get("stack_trace"), f"{node} has lost the user's line"
        assert node.meta.get("nn_module_stack"), f"{node} has lost the user's module"
    assert_true_vals(gm, *inputs)
    text = operators(gm)
    assert step.run(gm).changed == 0
    assert operators(gm) == text
    return count
