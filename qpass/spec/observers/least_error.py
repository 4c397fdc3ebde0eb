"""histogram -> the range whose quantization loses least, in the mean square.

The density is taken as flat inside each bin, and the squared error of the real quantizer (integer zero point, clamped
codes) is integrated over it in closed form. With ``t = x / scale + zero_point``, ``k = clamp(round(t))`` and ``r = t
- k`` the squared error in units of the scale is ``r**2``, and its integral is ``G(t) = k / 12 + r**3 / 3``: every
whole cell adds 1/12, and beyond the last codes ``r`` just grows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.arithmetic.numerics import choose_qparams
from qpass.spec.observers.base import is_eager

FRACTIONS = torch.logspace(0, -6, 49, base=2, dtype=torch.float64)
"""Parts of the full range that are tried: 1 down to 1/64, each 8.3 % less than the one before."""

FINE = torch.linspace(2.0**0.125, 2.0**-0.125, 17, dtype=torch.float64)
"""Factors that are tried around the best of them: one step of `FRACTIONS` to both sides."""


def least_error_range(
    histogram: Tensor,
    edges: Tensor,
    low: Tensor,
    high: Tensor,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The part of ``low..high`` to quantize so that the mean squared error over the histogram is least.

    First both ends shrink together, then each alone (affine only: symmetric qparams know one number), coarse steps
    before fine ones. A smaller range must be better to be taken, so the answer is never worse than the full range.

    Args:
        histogram: counts ``[bins]``; edges: float64 ``[bins + 1]``, equally spaced.
        low, high: float32 scalars, ends of the data.

    Returns:
        the two ends, float32 scalars.
    """
    if is_eager(histogram):  # leave out the empty bins at the ends, which cost time and change nothing
        used = histogram.nonzero()
        if used.numel() == 0:
            return low, high
        first, last = int(used[0]), int(used[-1])
        histogram, edges = histogram[first : last + 1], edges[first : last + 2]
    counts = histogram.to(torch.float64)

    def errors(lows: Tensor, highs: Tensor) -> Tensor:
        scale, zero_point = choose_qparams(lows, highs, quant_min, quant_max, symmetric, eps)
        scale = scale.to(torch.float64)[:, None]
        position = edges / scale + zero_point[:, None]
        code = position.round().clamp_(quant_min, quant_max)
        distance = position.sub_(code)
        integral = code.div_(12).add_(distance.pow(3), alpha=1 / 3)
        return torch.mv(integral.diff(dim=1), counts) * scale[:, 0] ** 3

    full_low, full_high = low.to(torch.float64), high.to(torch.float64)
    best_low, best_high = full_low, full_high
    least = errors(best_low[None], best_high[None])[0]
    moves = ((True, True),) if symmetric else ((True, True), (False, True), (True, False))
    for factors, around_best in ((FRACTIONS.to(low.device), False), (FINE.to(low.device), True)):
        for move_low, move_high in moves:
            base_low, base_high = (best_low, best_high) if around_best else (full_low, full_high)
            lows = (base_low * factors).clamp(min=full_low) if move_low else best_low.expand_as(factors)
            highs = (base_high * factors).clamp(max=full_high) if move_high else best_high.expand_as(factors)
            found = errors(lows, highs)
            index = found.argmin()
            better = found[index] < least
            least = torch.where(better, found[index], least)
            best_low, best_high = (
                torch.where(better, lows[index], best_low),
                torch.where(better, highs[index], best_high),
            )
    return best_low.to(torch.float32), best_high.to(torch.float32)
