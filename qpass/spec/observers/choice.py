"""spec -> observer: the one place where observers are made from a spec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qpass.errors import ConfigError
from qpass.spec import PerChannel, PerGroup, QuantizationSpec
from qpass.spec.observers.base import ObserverBase
from qpass.spec.observers.histogram import HistogramObserver
from qpass.spec.observers.min_max import PerChannelMinMaxObserver, PerGroupMinMaxObserver
from qpass.spec.observers.placeholder import PlaceholderObserver


def observer_for(spec: QuantizationSpec) -> ObserverBase:
    """A fresh observer for one tensor, with ``observer.spec is spec``.

    Without an `observer` of its own a spec gets: dynamic -> PlaceholderObserver, per tensor -> HistogramObserver,
    per channel -> PerChannelMinMaxObserver, per group -> PerGroupMinMaxObserver.

    Raises:
        ConfigError: `spec.observer` made something that is not an ObserverBase, or a fake-quantize module without
            saying so (`QuantizationSpec.trains`).
    """
    keywords: dict[str, Any] = {"dtype": spec.dtype, "qscheme": spec.qscheme}
    keywords |= {"quant_min": spec.quant_min, "quant_max": spec.quant_max}
    keywords["eps"] = spec.smallest_scale
    constructor: Callable[..., ObserverBase] = HistogramObserver
    if isinstance(spec.granularity, PerChannel):
        constructor = PerChannelMinMaxObserver
        keywords["ch_axis"] = spec.granularity.axis
    elif isinstance(spec.granularity, PerGroup):
        constructor = PerGroupMinMaxObserver
        keywords["group_size"] = spec.granularity.group_size
    if spec.dynamic:
        constructor = PlaceholderObserver
        keywords["is_dynamic"] = True
    observer: Any = (spec.observer or constructor)(**keywords)
    kind = f"{type(observer).__module__}.{type(observer).__qualname__}"
    if not isinstance(observer, ObserverBase):
        raise ConfigError(
            f"QuantizationSpec observer made a {kind}, which is not a qpass observer",
            hint="use a class of qpass.observer, or derive one from qpass.observer.ObserverBase",
        )
    if observer.trains != spec.trains:
        raise ConfigError(
            f"QuantizationSpec observer made a {kind}, and does not say that it {_does(observer)}",
            hint="use the class, its with_args(...) or a functools.partial of it, or give the callable an attribute "
            f"trains = {observer.trains}",
        )
    observer.spec = spec
    return observer


def _does(observer: ObserverBase) -> str:
    return "rounds in training" if observer.trains else "only observes"


QuantizationSpec.make_observer = observer_for
