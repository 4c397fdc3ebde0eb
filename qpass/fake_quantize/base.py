"""What every fake-quantize module has in common: qparams, and two switches that work from outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qpass.fake_quantize.rounding import fake_quantize
from qpass.observer.base import Constructor
from qpass.spec import QuantizationSpec


class FakeQuantizeBase(nn.Module):
    """Rounds a tensor as a q/dq pair does, with a gradient. To `prepare` and `convert` it is an observer.

    Both switches are tensors, so they work on a compiled or exported module too: ``module.observer_enabled[0] = 0``.

    Attributes:
        scale, zero_point: the qparams in use, float32 and int32: one element per tensor, else shaped by the
            granularity. They keep their dtype when the module is cast.
        fake_quant_enabled, observer_enabled: uint8 ``[1]``, 0 or 1.
    """

    scale: Tensor
    zero_point: Tensor
    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32))
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))

    @classmethod
    def with_args(cls, **keywords: Any) -> Constructor:
        """A constructor with some keywords given; keywords of the call win. It compares and hashes by its contents."""
        return Constructor(cls, tuple(sorted(keywords.items())))

    @property
    def spec(self) -> QuantizationSpec:
        """How the tensor is quantized."""
        raise NotImplementedError

    @property
    def has_data(self) -> bool:
        """Whether the qparams follow from something seen, or are fixed."""
        raise NotImplementedError

    def calculate_qparams(self) -> tuple[Tensor, Tensor]:
        """scale (float32) and zero_point (int32), those that `forward` rounds by."""
        return self.scale, self.zero_point

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round from now on, or with False hand every tensor on as it is."""
        self.fake_quant_enabled[0] = int(enabled)

    def disable_fake_quant(self) -> None:
        """Hand every tensor on as it is from now on."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Follow the tensors' range in training from now on, or with False keep the qparams as they are."""
        self.observer_enabled[0] = int(enabled)

    def disable_observer(self) -> None:
        """Keep the qparams as they are from now on."""
        self.enable_observer(False)

    def rounded(self, x: Tensor) -> Tensor:
        """x rounded by the qparams in use where `fake_quant_enabled`, else x."""
        y = fake_quantize(x, self.scale, self.zero_point, *self.spec.range, self.spec.granularity)
        return torch.where(self.fake_quant_enabled.bool(), y, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Qparams move between devices, but are not cast: ``model.bfloat16()`` must not round them."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)


def enable_fake_quant(module: nn.Module) -> None:
    """``model.apply(enable_fake_quant)``: every fake-quantize module rounds."""
    if isinstance(module, FakeQuantizeBase):
        module.enable_fake_quant()


def disable_fake_quant(module: nn.Module) -> None:
    """``model.apply(disable_fake_quant)``: the model computes what the float model does."""
    if isinstance(module, FakeQuantizeBase):
        module.disable_fake_quant()


def enable_observer(module: nn.Module) -> None:
    """``model.apply(enable_observer)``: ranges follow the tensors in training."""
    if isinstance(module, FakeQuantizeBase):
        module.enable_observer()


def disable_observer(module: nn.Module) -> None:
    """``model.apply(disable_observer)``: ranges stay as they are."""
    if isinstance(module, FakeQuantizeBase):
        module.disable_observer()
