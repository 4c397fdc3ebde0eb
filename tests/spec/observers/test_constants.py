"""An observer of a weight looks at it once, and again when the weight has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass


def watched(prepared: Any) -> tuple[Any, list[Tensor]]:
    """The observer of the only weight of a prepared graph, and all that it will have looked at."""
    (call,) = [
        node for node in prepared.graph.nodes if node.op == "call_module" and node.args[0].target == "weight"
    ]  # fmt: skip
    observer, looked_at = prepared.get_submodule(call.target), []
    observe = observer.observe

    def noted(x: Tensor) -> Any:
        looked_at.append(x)
        return observe(x)

    observer.observe = noted
    return observer, looked_at


@pytest.mark.parametrize("inference", [False, True])
def test_a_weight_is_looked_at_once_until_it_changes(inference: bool) -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(5, 4)
    prepared = qpass.prepare(model, (x,), config="int8_static")
    observer, looked_at = watched(prepared)
    with torch.inference_mode(inference):
        for _ in range(3):
            assert torch.equal(prepared(x), model(x))
    assert len(looked_at) == 1
    assert torch.equal(observer.max_val, model.weight.detach().amax(1))
    with torch.no_grad():
        model.weight.mul_(0.5)
    with torch.no_grad():
        prepared(x)
        prepared(x)
    assert len(looked_at) == 2
    assert torch.equal(observer.max_val, model.weight.detach().amax(1))  # of the new weight alone: half the old one
    model.weight.data = torch.full((3, 4), 3.0)
    prepared(x)
    assert len(looked_at) == 3
    observer.reset()
    prepared(x)
    assert len(looked_at) == 4


def test_convert_sees_a_weight_that_no_batch_saw() -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(5, 4)
    prepared = qpass.prepare(model, (x,), config="int8_static")
    prepared(x)
    with torch.no_grad():
        model.weight.mul_(4)
    scales = [value for name, value in qpass.convert(prepared).named_buffers() if name.endswith("weight_scale")]
    assert len(scales) == 1
    # exactly what the arithmetic of a symmetric range gives: the largest magnitude over 127
    torch.testing.assert_close(scales[0], model.weight.detach().abs().amax(1) / 127, rtol=1e-6, atol=0)


def test_a_constant_that_shares_its_observer_does_not_wipe_what_others_showed() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("prefix", torch.full((1, 4), 0.5))
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.cat([self.prefix, x]))

    x = torch.randn(5, 4)
    prepared: Any = qpass.prepare(Joined().eval(), (x,), config="int8_static")
    for scale in (9.0, 1.0):
        prepared(x * scale)
    ends = [module.max_val for module in prepared.modules() if isinstance(module, qpass.observer.HistogramObserver)]
    assert torch.equal(max(ends), x.max() * 9)
