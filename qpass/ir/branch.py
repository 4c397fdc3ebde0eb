"""The module of what a model draws at random in training only."""

from __future__ import annotations

from torch import Tensor, nn

from qpass.ir.training_modules import TrainingModule


class Branch(TrainingModule):
    """``body(x, *others)`` in training, x itself in evaluation: what a model draws at random in training only.

    Args:
        body: a graph module of the operators that training runs, with a random draw among them.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.body(x, *others) if self.training else x
