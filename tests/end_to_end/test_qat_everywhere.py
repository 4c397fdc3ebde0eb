"""A model that is prepared for training runs wherever models are trained: compiled, exported, cast, checkpointed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.export import Dim
from torch.utils.checkpoint import checkpoint

import qpass
from qpass.errors import CaptureError, InputError
from qpass.fake_quantize import FakeQuantizeBase
from qpass.presets import int8_qat

QAT = int8_qat(compute_dtype=None)
SHAPE = (4, 3, 6, 6)


def deep(layers: int = 10, channels: int = 4) -> nn.Module:
    """`layers` convolutions, a batch norm and dropout behind each."""
    found: list[nn.Module] = []
    for index in range(layers):
        found += [nn.Conv2d(channels if index else 3, channels, 3, padding=1, bias=False)]
        found += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*found)


def prepared(model: nn.Module | None = None) -> fx.GraphModule:
    return qpass.prepare((model or deep()).train(), (torch.randn(SHAPE),), config=QAT)


class Counter:
    """A backend that runs the graph as it is, and counts graphs."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.graphs += 1
        return gm.forward


def test_ten_layers_are_one_graph_for_every_batch_in_either_mode() -> None:
    model, counter = prepared(), Counter()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for batch in (4, 3, 7):
        x = torch.randn(batch, *SHAPE[1:])
        torch.manual_seed(1)
        y = compiled(x)
        torch.manual_seed(1)
        assert torch.equal(y, twin(x))
    assert counter.graphs == 1
    model.eval(), twin.eval()
    assert torch.equal(compiled(x), twin(x))
    assert counter.graphs == 2
    for (key, own), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(own, other), key


def test_a_compiled_step_of_training_is_the_eager_one() -> None:
    model = prepared(deep(2))
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    for _ in range(3):
        x = torch.randn(SHAPE)
        for run, optimizer in zip((compiled, twin), optimizers, strict=True):
            torch.manual_seed(1)
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
    for (key, own), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5, msg=key)  # decomposed norms sum in another order


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_it_exports_with_a_dynamic_batch(training: bool, strict: bool) -> None:
    model = prepared(deep(3)).train(training)
    model(torch.randn(SHAPE))
    shapes = ({0: Dim("batch", min=0)},)
    program = torch.export.export(model, (torch.randn(SHAPE),), dynamic_shapes=shapes, strict=strict)
    exported, twin = program.module(), copy.deepcopy(model)
    for batch in (1, 5, 0):
        x = torch.randn(batch, *SHAPE[1:])
        torch.manual_seed(1)
        y = exported(x)
        torch.manual_seed(1)
        assert torch.equal(y, twin(x))


def test_under_autocast_the_qparams_stay_float32() -> None:
    model = prepared(deep(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(SHAPE))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    fake_quants = [module for module in model.modules() if isinstance(module, FakeQuantizeBase)]
    assert {module.scale.dtype for module in fake_quants} == {torch.float32}
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    quantized = qpass.convert(model)
    assert quantized(torch.randn(SHAPE)).isfinite().all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_no_gradient(reentrant: bool) -> None:
    model = prepared(deep(2))
    twin, x = copy.deepcopy(model), torch.randn(SHAPE, requires_grad=True)
    for run in (lambda: model(x), lambda: checkpoint(twin, x, use_reentrant=reentrant)):
        torch.manual_seed(1)
        run().square().mean().backward()
    for (key, own), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(own.grad, other.grad), key
    for own, other in zip(model.modules(), twin.modules(), strict=True):
        if isinstance(own, FakeQuantizeBase):  # recomputing a batch is not seeing it again
            assert torch.equal(own.scale, other.scale)


def test_it_is_captured_at_its_first_batch() -> None:
    model = deep(2).train()
    later = qpass.prepare(model, config=QAT)
    later(torch.randn(SHAPE)).sum().backward()
    assert later.training
    assert qpass.convert(later)(torch.randn(2, *SHAPE[1:])).shape == (2, 4, 6, 6)


def test_what_was_traced_in_one_mode_cannot_be_trained() -> None:
    program = torch.export.export(deep(1).eval(), (torch.randn(SHAPE),))
    with pytest.raises(InputError, match=r"training needs the nn\.Module itself"):
        qpass.prepare(program, config=QAT)


def test_a_model_in_training_mode_is_refused_without_a_config_for_training() -> None:
    with pytest.raises(CaptureError, match="the model is in training mode"):
        qpass.prepare(deep(1).train(), (torch.randn(SHAPE),), config="int8_static")


def test_fewer_bits_have_fewer_codes() -> None:
    config = int8_qat(weight_bits=3, activation_bits=4, compute_dtype=None)
    model = qpass.prepare(deep(1).train(), (torch.randn(SHAPE),), config=config)
    model(torch.randn(SHAPE))
    quantized = qpass.convert(model)
    (codes,) = (tensor for name, tensor in quantized.named_buffers() if name.endswith("codes"))
    assert (codes.min(), codes.max()) == (-3, 3)
    (q,) = quantized.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.quantize_per_tensor.default
    )
    assert q.args[3:5] == (0, 15)
