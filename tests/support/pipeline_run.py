"""One small model through all stages, with everything checked on the way that must hold for every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

import qpass
from interpret import assert_true_vals
from kernel_comparison import Compared, compare_kernels
from qpass.capture.export import capture
from qpass.ir.record import NodeRecord, record_of
from qpass.ir.text import target_name
from qpass.presets import int8_dynamic, int8_static, int8_weight_only
from qpass.quantize.passes.annotate import Annotate
from qpass.spec.config import Config
from qpass.targets import X86

STATIC = int8_static(compute_dtype=None)
PER_TOKEN = int8_dynamic("token", compute_dtype=None)
PER_TENSOR = int8_dynamic("tensor", compute_dtype=None)
WEIGHT_ONLY = int8_weight_only(compute_dtype=None)
WEIGHT_BFLOAT16 = int8_weight_only(compute_dtype=torch.bfloat16)


class Do(nn.Module):
    """``Do(lambda m, x: m.fc(x), fc=nn.Linear(4, 4))``: a model in one line."""

    def __init__(self, function: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        self.function = function
        for name, member in members.items():
            setattr(self, name, member)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Stages(NamedTuple):
    """One model at three stages, and its kernels compared with the q/dq graph."""

    prepared: fx.GraphModule
    quantized: fx.GraphModule
    lowered: fx.GraphModule
    kernels: list[Compared]


def run_stages(model: nn.Module, *inputs: Tensor, config: Config = STATIC) -> Stages:
    """``model`` prepared, calibrated on ``inputs``, converted and lowered.

    Checked: with observers it computes what the float model computes, bit for bit; every ``val`` tells the truth;
    every kernel equals the q/dq graph within its bound.
    """
    model.eval()
    prepared = qpass.prepare(model, inputs, config=config)
    with torch.no_grad():
        assert same(prepared(*inputs), model(*inputs)), "observers change the result"
    quantized = qpass.convert(prepared)
    lowered = qpass.lower(quantized)
    for gm in (prepared, quantized, lowered):
        assert_true_vals(gm, *inputs)
    return Stages(prepared, quantized, lowered, compare_kernels(quantized, *inputs))


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal bit for bit."""
    pairs = list(zip(tree_leaves(a), tree_leaves(b), strict=True))
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


def decisions(model: nn.Module, *inputs: Tensor, config: Config = STATIC) -> dict[str, NodeRecord]:
    """The record of each operation by its name, as ``annotate`` leaves it; ``name_1`` for the second of a kind."""
    gm = capture(model.eval(), inputs)
    Annotate(config, X86).run(gm)
    return records(gm)


def records(gm: fx.GraphModule) -> dict[str, NodeRecord]:
    """The record of each operation of a graph, by the operation's name."""
    found: dict[str, NodeRecord] = {}
    for node in gm.graph.nodes:
        record = record_of(node)
        if record is not None:
            name = target_name(node)
            number = sum(key.partition(" ")[0] == name for key in found)
            found[f"{name} {number}" if number else name] = record
    return found


def reason(model: nn.Module, *inputs: Tensor, config: Config = STATIC, op: str = "linear") -> str:
    """Why ``op`` is left in float."""
    record = decisions(model, *inputs, config=config)[op]
    assert record.outcome == "float", f"{op} is {record.outcome}"
    return record.reason


def kernel_names(gm: fx.GraphModule) -> list[str]:
    """The kernels of a lowered graph in order, with what they do besides."""
    lowered = (record for record in records(gm).values() if record.outcome == "lowered")
    return [f"{record.kernel} {record.reason}".strip() for record in lowered]
