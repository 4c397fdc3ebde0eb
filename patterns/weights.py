"""Operators that read weights and that no pattern covers: left in floating point, each for its own reason."""

from __future__ import annotations

import torch

aten = torch.ops.aten

_BATCH = "its stored operand is a batch of matrices, and the catalogue covers products with one stored matrix"
_EINSUM = (
    "it is no product of rows with one stored matrix, in this order and summed over the last dimension of the rows, "
    'as einsum("...i,oi->...o", x, w) is'
)
_BAG = "it sums the rows that it looks up, and the catalogue covers look-ups alone"
_RECURRENT = "torch multiplies inside this one operator, where no q/dq pair can stand, so its weights stay in float"
_TRANSPOSED = "the catalogue has no transposed convolution"
_BILINEAR = "its stored operand has three dimensions, and the catalogue covers products with one stored matrix"
_LOOKED_UP = "rows of a stored tensor are indexed, and the catalogue covers look-ups by embedding alone"

OF_WEIGHTS: dict[object, str] = {
    aten.bmm.default: _BATCH, aten.baddbmm.default: _BATCH,
    aten.einsum.default: _EINSUM, aten.tensordot.default: _EINSUM,
    aten.bilinear.default: _BILINEAR, aten._trilinear.default: _BILINEAR,
    aten.index.Tensor: _LOOKED_UP, aten.index_select.default: _LOOKED_UP, aten.gather.default: _LOOKED_UP,
    **dict.fromkeys((aten.embedding_bag.padding_idx, aten.embedding_bag.default, aten._embedding_bag.default), _BAG),
    **dict.fromkeys(
        (
            aten.lstm.input, aten.lstm.data, aten.gru.input, aten.gru.data, aten.rnn_tanh.input, aten.rnn_tanh.data,
            aten.rnn_relu.input, aten.rnn_relu.data, aten.lstm_cell.default, aten.gru_cell.default,
            aten.rnn_tanh_cell.default, aten.rnn_relu_cell.default,
        ), _RECURRENT,
    ),
    **dict.fromkeys(
        (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input), _TRANSPOSED
    ),
}  # fmt: skip
"""Why weights stay in float, for operators that no pattern covers; others are covered by no pattern, and say so."""

CARRIED = "a region of control flow takes it as an operand that changes from call to call, so it is no constant inside"
"""Why weights stay in float that a loop carries, or that a region which several calls share is given."""
