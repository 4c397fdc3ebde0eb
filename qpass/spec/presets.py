"""name -> Config: the three ways to quantize that most models need, spelled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from qpass.errors import ConfigError, InputError, near
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec
from qpass.spec.config import ComputeDtype, Config
from qpass.spec.fake_quantize import FakeQuantize
from qpass.spec.observers import MovingAverageMinMaxObserver, MovingAveragePerChannelMinMaxObserver


def int8_static(*, compute_dtype: ComputeDtype = "auto") -> Config:
    """int8 arithmetic with activation ranges from calibration: the fastest, and the one that needs data.

    Activations: uint8, affine, per tensor, range by histogram. Weights: int8, symmetric, per output channel.
    """
    activation = QuantizationSpec(torch.uint8, PerTensor(), symmetric=False)
    return Config(activation=activation, weight=_int8_weight(), compute_dtype=compute_dtype)


def int8_dynamic(granularity: Literal["token", "tensor"] = "token", *, compute_dtype: ComputeDtype = "auto") -> Config:
    """int8 arithmetic with activation ranges found at run time: needs no calibration, follows every input.

    Activations: ``"token"``: int8, symmetric, a scale a row; ``"tensor"``: uint8, affine, a scale a tensor.
    Weights: int8, symmetric, per output channel.
    """
    activations = {
        "token": QuantizationSpec(torch.int8, PerToken(), symmetric=True, dynamic=True),
        "tensor": QuantizationSpec(torch.uint8, PerTensor(), symmetric=False, dynamic=True),
    }
    if granularity not in activations:
        raise ConfigError(
            f"int8_dynamic knows no granularity {granularity!r}{near(str(granularity), activations)}",
            hint="use 'token' or 'tensor'",
        )
    return Config(activation=activations[granularity], weight=_int8_weight(), compute_dtype=compute_dtype)


def int8_weight_only(*, group_size: int | None = None, compute_dtype: ComputeDtype = "auto") -> Config:
    """Weights at a quarter of their float32 size, arithmetic in float: for models that wait for memory.

    Weights: int8, symmetric, per output channel, or in groups of `group_size` along the last dimension.
    """
    return Config(weight=_int8_weight(group_size), compute_dtype=compute_dtype)


def int8_qat(*, weight_bits: int = 8, activation_bits: int = 8, compute_dtype: ComputeDtype = "auto") -> Config:
    """`int8_static` for a model that is trained further: values are rounded in training, and the weights adapt to it.

    Activations: affine, per tensor, range by moving average. Weights: symmetric, per output channel, their range at
    each step. Codes of fewer than 8 bits are stored in 8.

    Args:
        weight_bits, activation_bits: 2 to 8.
    """
    for name, bits in (("weight_bits", weight_bits), ("activation_bits", activation_bits)):
        if bits not in range(2, 9):
            raise ConfigError(f"int8_qat takes {name} from 2 to 8, not {bits!r}", hint="codes are stored in int8")
    largest = 2 ** (weight_bits - 1) - 1
    return Config(
        activation=QuantizationSpec(
            torch.uint8, PerTensor(), symmetric=False, quant_min=0, quant_max=2**activation_bits - 1,
            observer=FakeQuantize.with_args(observer=MovingAverageMinMaxObserver),
        ),
        weight=QuantizationSpec(
            torch.int8, PerChannel(0), symmetric=True, quant_min=-largest, quant_max=largest,
            observer=FakeQuantize.with_args(observer=MovingAveragePerChannelMinMaxObserver, averaging_constant=1.0),
        ),
        compute_dtype=compute_dtype,
    )  # fmt: skip


PRESETS: dict[str, Callable[[], Config]] = {
    "int8_static": int8_static,
    "int8_dynamic": int8_dynamic,
    "int8_weight_only": int8_weight_only,
    "int8_qat": int8_qat,
}


def get(name_or_config: str | Config) -> Config:
    """The preset of that name, or the config itself.

    Raises:
        ConfigError: no preset has that name; the nearest is offered.
        InputError: neither a name nor a Config.
    """
    if isinstance(name_or_config, Config):
        return name_or_config
    if not isinstance(name_or_config, str):
        raise InputError(
            f"A config is a Config or the name of a preset, not {type(name_or_config).__name__}",
            hint=f"pass one of {', '.join(PRESETS)}, or build a qpass.Config",
        )
    if name_or_config not in PRESETS:
        raise ConfigError(
            f"There is no preset {name_or_config!r}{near(name_or_config, PRESETS)}",
            hint=f"use one of {', '.join(PRESETS)}",
        )
    return PRESETS[name_or_config]()


def _int8_weight(group_size: int | None = None) -> QuantizationSpec:
    granularity = PerChannel(0) if group_size is None else PerGroup(group_size)
    return QuantizationSpec(torch.int8, granularity, symmetric=True)
