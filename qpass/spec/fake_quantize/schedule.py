"""What is held fixed towards the end of training, so that the weights settle on the codes they will have."""

from __future__ import annotations

from torch import nn

from qpass.spec.fake_quantize.base import FakeQuantizeBase
from qpass.torch_private import NormBase as _NormBase


def freeze_observers(module: nn.Module) -> None:
    """Keep every scale and zero point inside `module` as it is from now on, in training too."""
    for part in module.modules():
        if isinstance(part, FakeQuantizeBase):
            part.disable_observer()


def update_observers(module: nn.Module) -> None:
    """Undo `freeze_observers`."""
    for part in module.modules():
        if isinstance(part, FakeQuantizeBase):
            part.enable_observer()


def freeze_batch_norm_stats(module: nn.Module) -> None:
    """Normalise by the running statistics from now on, and leave them as they are, in training too.

    A module inside `module` that has a method of this name is told by it. A torch batch norm is put into evaluation
    mode, which a later ``module.train()`` undoes.
    """
    _tell_batch_norms(module, "freeze_batch_norm_stats", training=False)


def update_batch_norm_stats(module: nn.Module) -> None:
    """Undo `freeze_batch_norm_stats`."""
    _tell_batch_norms(module, "update_batch_norm_stats", training=True)


freeze_bn_stats, update_bn_stats = freeze_batch_norm_stats, update_batch_norm_stats  # torch's names


def _tell_batch_norms(module: nn.Module, method: str, training: bool) -> None:
    for part in module.modules():
        if callable(getattr(part, method, None)):
            getattr(part, method)()
        elif isinstance(part, _NormBase):
            part.train(training)
