"""Two switches and an observer inside: what every fake-quantize module has in common."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qpass.spec import QuantizationSpec
from qpass.spec.observers import ObserverBase


class FakeQuantizeBase(ObserverBase):
    """Watches one tensor like an observer and rounds it to what its codes stand for.

    It is an observer: `spec`, `has_data` and `calculate_qparams` are those of the observer inside and of the scale in
    use, so it can stand wherever one does. Both switches are buffers and are read where the graph runs, so they can be
    changed between calls of a compiled or exported module.

    Attributes:
        activation_post_process: the observer inside.
        fake_quant_enabled, observer_enabled: uint8 ``[1]``, 1 or 0.
    """

    trains = True

    activation_post_process: ObserverBase
    fake_quant_enabled: Tensor
    observer_enabled: Tensor

    def __init__(self, observer: ObserverBase) -> None:
        nn.Module.__init__(self)  # the spec is the observer's
        self.activation_post_process = observer
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))

    @property
    def spec(self) -> QuantizationSpec:
        return self.activation_post_process.spec

    @spec.setter
    def spec(self, spec: QuantizationSpec) -> None:
        self.activation_post_process.spec = spec

    def seen(self) -> Tensor:
        return self.activation_post_process.seen()

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round from now on, or do not."""
        self.fake_quant_enabled.fill_(int(enabled))

    def disable_fake_quant(self) -> None:
        """Hand tensors on as they are: bit for bit, forward and gradient."""
        self.enable_fake_quant(False)

    def enable_observer(self, enabled: bool = True) -> None:
        """Observe from now on (in training mode), or do not."""
        self.observer_enabled.fill_(int(enabled))

    def disable_observer(self) -> None:
        """Keep scale and zero point as they are."""
        self.enable_observer(False)

    def take_shape(self, x: Tensor) -> None:
        self.activation_post_process.take_shape(x)

    def reset(self) -> None:
        self.activation_post_process.reset()

    def reset_parameters(self) -> None:
        self.activation_post_process.reset_parameters()
        self.enable_fake_quant()
        self.enable_observer()
        self.reset()

    def extra_repr(self) -> str:
        if self.fake_quant_enabled.is_meta:
            return super().extra_repr()
        switches = f"fake_quant={bool(self.fake_quant_enabled)}, observer={bool(self.observer_enabled)}"
        return f"{super().extra_repr()}, {switches}"
