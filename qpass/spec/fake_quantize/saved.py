"""saved qparams -> what is wrong with them: a checkpoint is refused before it spoils a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from qpass.spec import PerTensor, PerToken, QuantizationSpec


def qparam_faults(
    spec: QuantizationSpec, own: tuple[Tensor, Tensor], state_dict: Mapping[str, Tensor], prefix: str
) -> Iterator[str]:
    """A sentence for each saved tensor of a module that cannot be, starting with its key.

    Args:
        own: the scale and the zero point that the module has now.
    """
    scale, zero_point = (state_dict.get(prefix + name) for name in ("scale", "zero_point"))
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if value is not None and not _fits(spec, own[0], value, scale):
            yield f"{prefix}{name} has shape {tuple(value.shape)}, but this module has {tuple(own[0].shape)}."
    low, high = spec.range
    if scale is not None and not scale.is_meta and not ((scale > 0) & scale.isfinite()).all():
        yield f"{prefix}scale holds {_odd(scale, (scale > 0) & scale.isfinite())}; scales are positive and finite."
    if zero_point is not None and not zero_point.is_meta:
        if own[1].is_floating_point():
            inside = zero_point.isfinite()
        else:
            inside = (zero_point >= low) & (zero_point <= high) & (zero_point == zero_point.round())
        if not inside.all():
            yield f"{prefix}zero_point holds {_odd(zero_point, inside)}, which is not within {low}..{high}."
    for name in ("fake_quant_enabled", "observer_enabled"):
        flag = state_dict.get(prefix + name)
        if flag is not None and (flag.numel() != 1 or not (flag.is_meta or flag.item() in (0, 1))):
            yield f"{prefix}{name} is {flag.tolist()}; it is one number, 0 or 1."


def _fits(spec: QuantizationSpec, own: Tensor, value: Tensor, scale: Tensor | None) -> bool:
    """One element per tensor; else any shape before there is data, then the same; and both qparams alike."""
    if scale is not None and value.shape != scale.shape:
        return False
    if isinstance(spec.granularity, PerTensor | PerToken):
        return value.numel() == 1
    return value.shape == own.shape or own.numel() == 1


def _odd(value: Tensor, fine: Tensor) -> float | int:
    number: float | int = value[~fine].flatten()[0].item()
    return number
