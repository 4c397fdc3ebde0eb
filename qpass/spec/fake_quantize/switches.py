"""``model.apply(disable_observer)``: both switches of every fake-quantize module of a model, by torch.ao's names."""

from __future__ import annotations

from torch import nn

from qpass.spec.fake_quantize.base import FakeQuantizeBase


def enable_fake_quant(module: nn.Module) -> None:
    """Round from now on, where `module` is a fake-quantize module."""
    if isinstance(module, FakeQuantizeBase):
        module.enable_fake_quant()


def disable_fake_quant(module: nn.Module) -> None:
    """Hand tensors on as they are, where `module` is a fake-quantize module."""
    if isinstance(module, FakeQuantizeBase):
        module.disable_fake_quant()


def enable_observer(module: nn.Module) -> None:
    """Observe from now on, where `module` is a fake-quantize module."""
    if isinstance(module, FakeQuantizeBase):
        module.enable_observer()


def disable_observer(module: nn.Module) -> None:
    """Keep scale and zero point as they are, where `module` is a fake-quantize module."""
    if isinstance(module, FakeQuantizeBase):
        module.disable_observer()
