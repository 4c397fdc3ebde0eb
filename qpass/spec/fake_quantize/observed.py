"""observer -> scale, zero_point -> rounding: the fake-quantize module whose scale follows what was observed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from qpass.arithmetic import choose
from qpass.errors import ConfigError
from qpass.ir.training_modules import in_backward
from qpass.spec import PerChannel, PerTensor, PerToken
from qpass.spec.fake_quantize.base import FakeQuantizeBase
from qpass.spec.fake_quantize.rounding import aligned, decoded, grouped, recomputed, straight_through
from qpass.spec.fake_quantize.saved import qparam_faults
from qpass.spec.fake_quantize.synchronize import warn_of_unsynchronized
from qpass.spec.observers import MovingAverageMinMaxObserver, ObserverBase
from qpass.spec.observers.base import check_floating, has_values, is_eager, is_readable
from qpass.spec.observers.statistics import StatisticsObserver


class FakeQuantize(FakeQuantizeBase):
    """``x -> dequantize(quantize(x))``: the values that the converted model computes with, differentiable.

    In training mode, while `observer_enabled`, every tensor first goes to the observer inside, and its scale and zero
    point are taken over. ``eval()`` freezes them. Then, while `fake_quant_enabled`, the tensor is rounded; otherwise
    the output is the input, bit for bit, and so is its gradient. A dynamic spec takes scale and zero point from each
    tensor itself, as the dynamic operators do, and keeps none.

    Recomputation of a forward inside a backward (``torch.utils.checkpoint``) observes nothing a second time.

    Args:
        observer: a class, or a constructor made by ``with_args``; it is called with the other keywords.
        quant_min, quant_max: bounds of the codes, both inclusive. None: the dtype's.
        is_dynamic: choose scale and zero point from each tensor.
        observer_kwargs: more keywords of the observer, as torch.ao's: ``dtype qscheme ch_axis eps reduce_range …``.

    Attributes:
        scale: float32, ``[1]`` per tensor, ``[C]`` per channel, ``[..., K / group_size]`` per group; 1 before data.
        zero_point: int32 (float32 where the observer's qscheme has float zero points), shaped like `scale`.

    Shapes: the first tensor decides the number of channels or groups. Under ``torch.compile`` that may be a compiled
    call (which then compiles once more); before ``torch.export`` call the module once, or `take_shape`.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        observer: Callable[..., Any] = MovingAverageMinMaxObserver,
        quant_min: int | None = None,
        quant_max: int | None = None,
        is_dynamic: bool = False,
        **observer_kwargs: Any,
    ) -> None:
        if quant_min is not None:
            observer_kwargs["quant_min"] = quant_min
        if quant_max is not None:
            observer_kwargs["quant_max"] = quant_max
        if is_dynamic:
            observer_kwargs["is_dynamic"] = True
        made = observer(**observer_kwargs)
        if not isinstance(made, ObserverBase):
            raise ConfigError(
                f"{type(self).__name__} observer made a {type(made).__module__}.{type(made).__qualname__}, which is "
                "not a qpass observer",
                hint="use a class of qpass.observer",
            )
        super().__init__(made)
        self._register_qparams()

    def _register_qparams(self) -> None:
        whole = not getattr(self.activation_post_process, "float_qparams", False)
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("zero_point", torch.zeros(1, dtype=torch.int32 if whole else torch.float32))

    @property
    def ch_axis(self) -> int:
        """The dimension of the channels, -1 where there are none."""
        return self.spec.granularity.axis if isinstance(self.spec.granularity, PerChannel) else -1

    @property
    def is_per_channel(self) -> bool:
        return isinstance(self.spec.granularity, PerChannel)

    def forward(self, x: Tensor) -> Tensor:
        """`x`, observed and rounded; its dtype and shape.

        Raises:
            CalibrationError: `x` is not of a floating dtype, or has another number of channels than before.
        """
        check_floating(x, self)
        if self.training and has_values(x, self.fake_quant_enabled):
            self.observe(x.detach())
        if not is_eager(x):
            return recomputed(self.round, x, self.fake_quant_enabled[0].bool())
        return self.round(x, None) if self.fake_quant_enabled[0] else x

    def observe(self, x: Tensor) -> None:
        """Show `x` to the observer and take over its qparams, if `observer_enabled`."""
        observer = self.activation_post_process
        if isinstance(observer, StatisticsObserver) and observer.process_group is None:
            warn_of_unsynchronized()
        if is_eager(x):
            if self.observer_enabled[0] and not in_backward():
                observer(x)
                if not self.is_dynamic and observer.has_data:
                    self._take(*observer.choose_qparams(), None)
            return
        if is_readable(self.observer_enabled) and not self.observer_enabled[0]:
            return
        observer.take_shape(x)
        on = self.observer_enabled[0].bool()
        before = [(buffer, buffer.clone()) for buffer in observer.buffers()]
        observer(x)
        for buffer, old in before:
            buffer.copy_(torch.where(on, buffer, old))
        if not self.is_dynamic:
            self._take(*observer.choose_qparams(), on & observer.seen())

    def round(self, x: Tensor, on: Tensor | None) -> Tensor:
        """`x` rounded where `on`, a bool scalar, is true; None: always."""
        spec = self.spec
        whole = grouped(x, spec)
        scale, zero_point = self.qparams_of(x)
        value, inside, _ = decoded(whole, scale, zero_point, spec)
        if on is not None:
            value, inside = torch.where(on, value, whole.detach()), inside | ~on
        elif not (x.requires_grad and torch.is_grad_enabled()):
            return value.reshape(x.shape)
        return straight_through(torch.where(inside, whole, 0), value).reshape(x.shape)

    def qparams_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point that broadcast with ``grouped(x)``."""
        spec = self.spec
        if not spec.dynamic:
            return aligned(x, self.scale, spec), aligned(x, self.zero_point, spec)
        x = x.detach()
        if isinstance(spec.granularity, PerToken):
            per_token = (
                choose.choose_qparams_per_token_floored
                if spec.symmetric
                else choose.choose_qparams_per_token_asymmetric
            )
            return per_token(x, spec.dtype)
        whole = choose.choose_qparams_symmetric if spec.symmetric else choose.choose_qparams
        scale, zero_point = whole(x, *spec.range, self.eps, spec.dtype)
        return scale.reshape(()), zero_point.reshape(())

    def take_shape(self, x: Tensor) -> None:
        """Give scale and zero point, and the observer's buffers, the shape that tensors like `x` need."""
        self.activation_post_process.take_shape(x)
        if not isinstance(self.spec.granularity, PerTensor | PerToken):
            self._fit(self.activation_post_process.choose_qparams()[0].shape)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Refuse qparams that cannot be: by the name of their key, and without loading any of this module's own."""
        faults = list(qparam_faults(self.spec, (self.scale, self.zero_point), state_dict, prefix))
        if faults:
            error_msgs += faults
            return
        if prefix + "scale" in state_dict:
            self._fit(state_dict[prefix + "scale"].shape)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def choose_qparams(self) -> tuple[Tensor, Tensor]:
        """The scale and the zero point that `forward` rounds with."""
        return self.scale.detach(), self.zero_point

    def reset(self) -> None:
        super().reset()
        self.scale.detach().fill_(1)
        self.zero_point.zero_()

    def _take(self, scale: Tensor, zero_point: Tensor, on: Tensor | None) -> None:
        self._fit(scale.shape)
        for own, new in ((self.scale.detach(), scale), (self.zero_point, zero_point)):
            own.copy_(new if on is None else torch.where(on, new, own))

    def _fit(self, shape: Sequence[int]) -> None:
        """Give scale and zero point that shape."""
        if self.scale.shape == torch.Size(shape):
            return
        if is_eager(self.scale):
            self.scale.resize_(shape).fill_(1)
            self.zero_point.resize_(shape).zero_()
        else:  # a graph may not resize a tensor it was given
            self.scale = self.scale.new_ones(shape)
            self.zero_point = self.zero_point.new_zeros(shape)
