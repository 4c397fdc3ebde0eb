"""tensor -> the range that loses least of it, by trying ranges on the very values: for weights, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.arithmetic import numerics
from qpass.arithmetic.numerics import choose_qparams
from qpass.spec.observers.least_error import FINE, FRACTIONS
from qpass.spec.observers.min_max import PerChannelMinMaxObserver

TRIED = 1 << 20
"""Values that are tried at once."""


class PerChannelMSEObserver(PerChannelMinMaxObserver):
    """For each index of dimension `ch_axis`, the part of its range whose mean squared quantization error is least.

    Both ends shrink together, from all of the range to 1/64 of it, in steps of 8.3 % and then of 1.1 % around the best;
    values beyond are clamped. A part must be better to be taken, so the answer is never worse than the full range. Of
    several tensors the ranges are joined. `HistogramObserver` does the same for a whole tensor, over all batches.

    Keywords as `PerChannelMinMaxObserver`.
    """

    def extrema(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low, high, left_out = super().extrema(x)
        rows = x.movedim(self.ch_axis, 0).flatten(1)
        seen = low <= high
        if rows.numel() == 0:
            return low, high, left_out
        best = torch.ones_like(low, dtype=torch.float64)
        least = self._errors(rows, low, high, best)
        for factors in (FRACTIONS[1:], FINE):
            base = best  # all of the range, then the best part of it
            for factor in factors.to(best.device):
                tried = (base * factor).clamp(max=1.0)
                errors = self._errors(rows, low, high, tried)
                better = errors < least
                best, least = torch.where(better, tried, best), torch.where(better, errors, least)
        low, high = (torch.where(seen, end * best, end).to(torch.float32) for end in (low, high))
        return low, high, left_out

    def _errors(self, rows: Tensor, low: Tensor, high: Tensor, factor: Tensor) -> Tensor:
        """The squared error of each row (float64) when that part of its range is quantized, of its finite values."""
        scale, zero_point = choose_qparams(low * factor, high * factor, *self.spec.range, self.spec.symmetric, self.eps)
        step = max(1, TRIED // max(1, len(rows)))
        total = torch.zeros_like(factor)
        for part in rows.split(step, dim=1):
            usable = torch.where(part.isfinite(), part, 0).to(torch.float32)
            codes = numerics.quantize(usable, scale[:, None], zero_point[:, None], *self.spec.range, self.dtype)
            value = numerics.dequantize(codes, scale[:, None], zero_point[:, None])
            total += (value - usable).square_().sum(1, dtype=torch.float64)
        return total
