"""Every error of ``torch.compile(..., backend="qpass")``, word for word; Dynamo wraps what a backend raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import qpass
from qpass.errors import ConfigError

X = torch.zeros(2, 4)


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def test_an_unknown_option_of_the_backend() -> None:
    with pytest.raises(ConfigError) as preset:
        qpass.backend("int8_dynamc")
    assert str(preset.value) == (
        "There is no preset 'int8_dynamc' (did you mean 'int8_dynamic'?)\n"
        "  to do: use one of int8_static, int8_dynamic, int8_weight_only, int8_qat"
    )
    with pytest.raises(ConfigError) as option:
        qpass.backend(inductor={"max_autotun": True})
    assert str(option.value) == (
        "unknown Inductor option 'max_autotun' (did you mean 'max_autotune'?)\n  to do: see torch._inductor.config"
    )


STATIC_BACKEND = (
    "a static configuration needs calibration, and a float model was given to the backend\n"
    "  to do: use qpass.prepare, calibrate and convert first, or the presets int8_dynamic or int8_weight_only"
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"confg": "int8_dynamic"},
            "unknown option 'confg' (did you mean 'config'?)\n  to do: use config, target, strict, inductor, comm",
        ),
        (
            {"config": "int8_dynamc"},
            "There is no preset 'int8_dynamc' (did you mean 'int8_dynamic'?)\n"
            "  to do: use one of int8_static, int8_dynamic, int8_weight_only, int8_qat",
        ),
        ({"config": "int8_static"}, STATIC_BACKEND),
        (
            {"max_autotune": True},
            "unknown option 'max_autotune'\n  to do: it is Inductor's: options={'inductor': {'max_autotune': ...}}",
        ),
    ],
    ids=["option", "preset", "static", "inductor"],
)
@torch.no_grad()
def test_options_given_to_torch_compile(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendCompilerFailed) as raised:
        torch.compile(two(), backend="qpass", options=options)(X)
    assert type(raised.value.inner_exception) is ConfigError
    assert str(raised.value.inner_exception) == message
    assert str(raised.value).startswith(f"backend='qpass' raised:\nConfigError: {message}\n")


@torch.no_grad()
def test_an_unknown_mode_and_options_beside_a_backend_of_ones_own() -> None:
    for given, message in (
        (
            {"backend": "qpass", "mode": "max-autotun"},
            "unknown mode 'max-autotun' (did you mean 'max-autotune'?)\n"
            "  to do: use default, lite, reduce-overhead, max-autotune-no-cudagraphs, max-autotune",
        ),
        (
            {"backend": qpass.backend(), "options": {"strict": True}},
            "torch.compile was given options beside a backend that has its own\n"
            '  to do: give them to qpass.backend(...), or use backend="qpass"',
        ),
    ):
        with pytest.raises(BackendCompilerFailed) as raised:
            torch.compile(two(), **given)(X)
        assert type(raised.value.inner_exception) is ConfigError
        assert str(raised.value.inner_exception) == message
