"""Modules that compute one thing in training and another in evaluation, which no operator of a graph can.

A graph that is captured for training holds them where the model has dropout and batch norm. So ``.train()`` and
``.eval()`` work on the graph module as on the model. They own no parameters and no buffers. Those stay where the model
has them, under their own names, and are given as arguments.

A batch norm behind a quantized convolution is trained *folded*, since that is how it runs later: the weight that is
rounded is the weight times ``factor = weight / sqrt(running_var + eps)`` (section 3.2 of Jacob et al. 2018,
https://arxiv.org/abs/1712.05877, with the division of the result by the factor that Krishnamoorthi 2018,
https://arxiv.org/abs/1806.08342, adds so that batch statistics stay those of the unscaled result).

    training     batch_norm(conv(x, fq(w * factor), b * factor) / factor)
    evaluation   conv(x, fq(w * factor), (b - mean) * factor + bias)             what `convert` makes of it
    fq disabled  batch_norm(conv(x, w, b))                                       the float model
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpass import torch_private

aten = torch.ops.aten

DROPOUT: dict[Any, str] = {
    aten.dropout.default: "dropout",
    aten.feature_dropout.default: "feature_dropout",
    aten.alpha_dropout.default: "alpha_dropout",
    aten.feature_alpha_dropout.default: "feature_alpha_dropout",
}
"""The operators that drop elements or channels at random, each with its name."""

FLAGGED: dict[Any, str] = {
    aten.rrelu.default: "training",
    **{
        getattr(getattr(aten, name), form): "train"
        for name in ("gru", "lstm", "rnn_tanh", "rnn_relu")
        for form in ("input", "data")
    },
}
"""Operators that stay where they are in either mode, each with the name of its flag for training."""

BY_MODE = "qpass_by_mode"
"""``meta`` key on an operator of a captured graph that computes something else in training: its `TrainingChange`."""


@dataclass(frozen=True)
class TrainingChange:
    """What training changes about an operator.

    Attributes:
        training: whether the module that called it was in training mode when it was captured.
        p: the probability of dropout in training.
        momentum: of a batch norm; None for the average over all batches.
        tracked: the dotted name of a batch norm's ``num_batches_tracked``, "" where it has none.
        count: that tensor, which no operator of evaluation reads.
        held: the model's own ``train()`` leaves the module in evaluation mode.
        kind: the class of the model's batch norm module, None for a functional call.
        alone: the model's module there holds nothing, so that the module of training may stand in its place.
    """

    training: bool
    p: float = 0.0
    momentum: float | None = None
    tracked: str = ""
    count: Tensor | None = field(default=None, compare=False, repr=False)
    held: bool = False
    kind: type | None = field(default=None, compare=False, repr=False)
    alone: bool = field(default=False, compare=False, repr=False)


class TrainingModule(nn.Module):
    """Base of the modules of this file; `training` decides what they compute.

    Attributes:
        held: ``train()`` of the whole graph module leaves it in evaluation mode, as that of the model does.
    """

    held = False


class Dropout(TrainingModule):
    """``dropout(x, p)`` in training, x itself in evaluation.

    Args:
        kind: the operator, by its name in `DROPOUT`.
        p: the probability of an element (a channel) to become zero.
    """

    def __init__(self, kind: str, p: float) -> None:
        super().__init__()
        self.kind, self.p = kind, p

    def forward(self, x: Tensor) -> Tensor:
        return getattr(aten, self.kind).default(x, self.p, True) if self.training else x

    def extra_repr(self) -> str:
        return f"{self.kind}, p={self.p}"


class Attention(TrainingModule):
    """``scaled_dot_product_attention`` whose probabilities are dropped with probability `dropout_p` in training."""

    def __init__(self, dropout_p: float) -> None:
        super().__init__()
        self.dropout_p = dropout_p

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        p = self.dropout_p if self.training else 0.0
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    def extra_repr(self) -> str:
        return f"dropout_p={self.dropout_p}"


class Flagged(TrainingModule):
    """An operator of `FLAGGED`, called with all its arguments but the flag, which is that of this module.

    Args:
        operator: ``aten.gru.input``, say; a recurrent layer drops between its layers in training.
    """

    def __init__(self, operator: torch_private.OpOverload) -> None:
        super().__init__()
        self.operator = operator
        self.place = [argument.name for argument in operator._schema.arguments].index(FLAGGED[operator])

    def with_flag(self, arguments: tuple[Any, ...], training: bool) -> tuple[Any, ...]:
        """All arguments of the operator."""
        return (*arguments[: self.place], training, *arguments[self.place :])

    def forward(self, *arguments: Any) -> Any:
        return self.operator(*self.with_flag(arguments, self.training))


class Statistics(TrainingModule):
    """What depends on the statistics of a batch norm; once they are frozen, training computes as evaluation does."""

    frozen = False

    def freeze_batch_norm_stats(self) -> None:
        """Use the running statistics from now on, and leave them as they are, in training too."""
        self.frozen = True

    def update_batch_norm_stats(self) -> None:
        """Undo `freeze_batch_norm_stats`."""
        self.frozen = False

    freeze_bn_stats, update_bn_stats = freeze_batch_norm_stats, update_batch_norm_stats  # torch's names

    @property
    def uses_batch(self) -> bool:
        """Whether the batch's own statistics normalise it."""
        return self.training and not self.frozen


class BatchNorm(Statistics):
    """``batch_norm``, by the statistics of the batch in training, which then move the running ones.

    Args:
        eps, momentum: those of the model; a momentum of None means the average over all batches, which is taken in the
            dtype of the statistics (torch's own takes it in float64).
    """

    def __init__(self, eps: float, momentum: float | None) -> None:
        nn.Module.__init__(self)  # torch's own, which may follow, would make parameters
        self.eps, self.momentum = eps, momentum

    def forward(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        num_batches_tracked: Tensor | None = None,
        factor: Tensor | None = None,
        enabled: Tensor | None = None,
    ) -> Tensor:
        """x ``[N, C, ...]``; the parameters, statistics and factor ``[C]``; enabled ``[1]``.

        With a factor it stands behind a convolution that `FoldedWeight` and `FoldedBias` have scaled by it; ``enabled``
        is the ``fake_quant_enabled`` of the weight: where it is 0 nothing was scaled.
        """
        affine, statistics = (weight, bias), (running_mean, running_var)
        if self.uses_batch:
            unscaled = x if factor is None else (x / factor.reshape(1, -1, *[1] * (x.dim() - 2))).to(x.dtype)
            return self._by_batch(unscaled, *affine, *statistics, num_batches_tracked)
        y = F.batch_norm(x, *statistics, *affine, False, 0.0, self.eps)
        return y if enabled is None else torch.where(enabled.bool(), x, y)

    def _by_batch(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor, running_var: Tensor,
        num_batches_tracked: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if num_batches_tracked is not None:
            num_batches_tracked.add_(1)
        if self.momentum is not None:
            return F.batch_norm(x, running_mean, running_var, weight, bias, True, self.momentum, self.eps)
        assert num_batches_tracked is not None
        mean, var = torch.zeros_like(running_mean), torch.zeros_like(running_var)
        y = F.batch_norm(x, mean, var, weight, bias, True, 1.0, self.eps)  # a momentum of 1: the batch's own
        share = num_batches_tracked.to(mean.dtype).reciprocal()
        running_mean.lerp_(mean, share)
        running_var.lerp_(var, share)
        return y

    def extra_repr(self) -> str:
        return f"eps={self.eps}, momentum={self.momentum}"


class BatchNorm1d(BatchNorm, nn.BatchNorm1d):  # type: ignore[misc]  # a graph calls it, with its own tensors
    """Stands in the place of the model's own, so that code that looks for batch norms finds it with its parameters."""


class BatchNorm2d(BatchNorm, nn.BatchNorm2d):  # type: ignore[misc]  # a graph calls it, with its own tensors
    """As `BatchNorm1d`."""


class BatchNorm3d(BatchNorm, nn.BatchNorm3d):  # type: ignore[misc]  # a graph calls it, with its own tensors
    """As `BatchNorm1d`."""


class Following(TrainingModule):
    """What depends on the statistics that a batch norm uses; it does as the batch norm does, whatever its own mode."""

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__()
        self._norm = (norm,)  # known, not owned

    @property
    def uses_batch(self) -> bool:
        """Whether the batch's own statistics normalise it."""
        return self._norm[0].uses_batch


class FoldFactor(Following):
    """``weight / sqrt(running_var + eps)``, by the operations of `FoldBatchNorm`; 1 where nothing is folded.

    Where a forward pass is computed again during the backward pass, as activation checkpointing does it, the factor is
    that of the first time, although the batch norm has moved its statistics since.
    """

    def __init__(self, norm: BatchNorm) -> None:
        super().__init__(norm)
        self.eps = norm.eps
        self._first_var: Tensor | None = None

    def forward(self, weight: Tensor | None, running_var: Tensor, enabled: Tensor) -> Tensor:
        """weight and running_var ``[C]``, those of the batch norm; enabled ``[1]``, the ``fake_quant_enabled`` of the
        convolution's weight. Returns ``[C]``."""
        if self.uses_batch and not torch.compiler.is_compiling():
            if in_backward() and self._first_var is not None:
                running_var = self._first_var
            else:
                self._first_var = running_var.clone()
        factor = torch.rsqrt(running_var + self.eps)
        factor = factor if weight is None else factor * weight
        return torch.where(enabled.bool(), factor, 1.0)


class FoldedWeight(TrainingModule):
    """``w * factor``, a factor for each output channel."""

    def forward(self, w: Tensor, factor: Tensor) -> Tensor:
        """w ``[C, ...]``, factor ``[C]``."""
        return w * factor.reshape(-1, *[1] * (w.dim() - 1))


class FoldedBias(Following):
    """``b * factor`` where the batch norm follows, ``(b - mean) * factor + bias`` where it is folded in."""

    def forward(
        self, b: Tensor | None, factor: Tensor, bias: Tensor | None, running_mean: Tensor, enabled: Tensor
    ) -> Tensor:
        """All of ``[C]``, `b` the convolution's own bias; enabled ``[1]``."""
        plain = torch.zeros_like(running_mean) if b is None else b
        if self.uses_batch:
            return plain * factor
        shift = (-running_mean if b is None else b - running_mean) * factor
        return torch.where(enabled.bool(), shift if bias is None else shift + bias, plain)


def in_backward() -> bool:
    """Whether autograd is running a backward pass, in which a forward pass is one that is computed again."""
    return torch_private.current_graph_task_id() != -1
