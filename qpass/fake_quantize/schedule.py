"""What is held fixed towards the end of training, so that the weights settle on the codes they will have."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from qpass.fake_quantize.base import FakeQuantizeBase
from qpass.modes import Statistics


def freeze_observers(model: nn.Module) -> None:
    """Keep every scale and zero point as it is from now on, in training too."""
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_observer()


def update_observers(model: nn.Module) -> None:
    """Undo `freeze_observers`."""
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            module.enable_observer()


def freeze_batch_norm_stats(model: nn.Module) -> None:
    """Normalise by the running statistics from now on, and leave them as they are, in training too.

    A torch batch norm is put into evaluation mode for this, which a later ``model.train()`` undoes; those of a
    prepared model stay frozen.
    """
    for module in model.modules():
        if isinstance(module, Statistics):
            module.freeze_batch_norm_stats()
        elif isinstance(module, _NormBase):
            module.eval()


def update_batch_norm_stats(model: nn.Module) -> None:
    """Undo `freeze_batch_norm_stats`."""
    for module in model.modules():
        if isinstance(module, Statistics):
            module.update_batch_norm_stats()
        elif isinstance(module, _NormBase):
            module.train()
