from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from qpass import presets
from qpass.errors import ConfigError, InputError
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec
from qpass.spec.config import INHERIT, Config, Override, Resolved, resolve_compute_dtype, unmatched
from qpass.spec.fake_quantize import FakeQuantize
from qpass.spec.observers import MinMaxObserver, ObserverBase

A = QuantizationSpec(torch.uint8, symmetric=False)
W = QuantizationSpec(granularity=PerChannel(0))
W4 = QuantizationSpec(granularity=PerChannel(0), quant_min=-8, quant_max=7)
PATH = [("", nn.Sequential), ("encoder", nn.TransformerEncoderLayer), ("encoder.fc1", nn.Linear)]


def test_the_first_match_wins() -> None:
    config = Config(A, W).override(module="encoder.fc1", weight=W4).keep_float(module="encoder*")
    assert config.resolve(PATH, "aten.linear.default") == Resolved(A, W4, 0)
    assert config.resolve(PATH[:2], "aten.linear.default") == Resolved(None, None, 1)
    assert config.resolve([("head", nn.Linear)], "aten.linear.default") == Resolved(A, W, None)


@pytest.mark.parametrize(
    ("override", "matches"),
    [
        (Override(module="encoder"), True),  # holds for everything inside
        (Override(module="enc*.fc?"), True),
        (Override(module="fc1"), False),
        (Override(module_type=nn.Linear), True),
        (Override(module_type=nn.Module), True),  # a base class
        (Override(module_type="Linear"), True),
        (Override(module_type="torch.nn.modules.linear.Linear"), True),
        (Override(module_type="Conv2d"), False),
        (Override(op="linear"), True),
        (Override(op="aten.linear"), True),
        (Override(op="aten.linear.default"), True),
        (Override(op="conv*"), False),
        (Override(module="encoder", op="linear"), True),
        (Override(module="encoder", op="matmul"), False),
        (Override(module="encoder", module_type=nn.Linear), False),  # of one and the same module
        (Override(module="encoder.*", module_type=nn.Linear), True),
    ],
)
def test_override_matches(override: Override, matches: bool) -> None:
    assert override.matches(PATH, "aten.linear.default") is matches
    named = [(path, f"{kind.__module__}.{kind.__qualname__}") for path, kind in PATH]  # as torch.export writes types
    assert override.matches(named, "aten.linear.default") is (matches and override.module_type is not nn.Module)


def test_configs_are_values() -> None:
    def make() -> Config:
        return Config(A, W, "auto").keep_float(module="head").override(op="linear", weight=W4)

    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != Config(A, W, "auto")
    assert Config(A).overrides == ()


def test_override_inherits_what_it_does_not_say() -> None:
    resolved = Config(A, W).override(op="linear", activation=None).resolve(PATH, "linear")
    assert resolved == Resolved(None, W, 0)
    assert repr(Override(op="linear").weight) == "INHERIT"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Config().override(weight=W),
            "An override names no module, module_type or op, so it would hold everywhere\n"
            "  to do: name what it is for, or change the config's own activation and weight",
        ),
        (lambda: Config(weight=8), "Config weight must be a QuantizationSpec or None, not 8"),
        (lambda: Config(weight=INHERIT), "Config weight has nothing to inherit from: INHERIT belongs in an override"),
        (
            lambda: Override(op="linear", weight=8),
            "Override weight must be a QuantizationSpec or None, not 8",
        ),
        (
            lambda: Config(compute_dtype="bfloat"),
            "Config compute_dtype cannot be 'bfloat' (did you mean 'bfloat16'?)\n"
            "  to do: use 'auto', 'bfloat16', 'float16', 'float32' (or torch.bfloat16 and so on) or None",
        ),
        (lambda: Config(overrides=("fc1",)), "Config overrides must be Override objects, not 'fc1'"),
    ],
)
def test_nonsense_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        make()
    assert str(error.value) == message


def test_overrides_that_match_nothing_are_named_with_their_neighbours() -> None:
    config = Config(A, W).keep_float(module="encoder.fc1").keep_float(module="encodr.fc2").keep_float(op="aten.matmull")
    error = unmatched(
        config, {0}, ["", "encoder", "encoder.fc1", "encoder.fc2"], ["aten.linear.default", "aten.matmul"]
    )
    assert str(error) == (
        "Override 1 (module='encodr.fc2') matches nothing in this model (did you mean 'encoder.fc2'?); "
        "override 2 (op='aten.matmull') matches nothing in this model (did you mean 'aten.matmul'?)\n"
        "  to do: correct the name, or remove the override; the first match wins, so an earlier one may hide it"
    )
    assert unmatched(config, {0, 1, 2}, [], []) is None


def test_an_override_behind_another_is_not_told_its_own_name() -> None:
    config = Config(A, W).keep_float(op="conv*").keep_float(op="conv2d")
    error = unmatched(config, {0}, [], ["conv", "aten.conv2d.default"])
    assert str(error).startswith("Override 1 (op='conv2d') matches nothing that no earlier one does\n")


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_compute_dtype_may_be_given_by_name(name: str) -> None:
    assert Config(compute_dtype=name) == Config(compute_dtype=getattr(torch, name))  # type: ignore[arg-type]
    assert presets.int8_dynamic(compute_dtype=name).compute_dtype is getattr(torch, name)  # type: ignore[arg-type]


def test_auto_compute_dtype_is_what_the_target_says() -> None:
    for fast in (torch.bfloat16, torch.float16, None):
        assert resolve_compute_dtype(Config(compute_dtype="auto"), fast) == fast
        assert resolve_compute_dtype(Config(compute_dtype="float16"), fast) == torch.float16
        assert resolve_compute_dtype(Config(), fast) is None


def test_a_config_knows_whether_it_trains_without_making_an_observer() -> None:
    def made(**keywords: object) -> ObserverBase:
        raise AssertionError

    fakes: list[Any] = [FakeQuantize, FakeQuantize.with_args(observer=made), partial(FakeQuantize, observer=made)]
    for observer in (*fakes, partial(partial(fakes[1], eps=1e-3))):
        spec = QuantizationSpec(observer=observer)
        assert Config(weight=spec).trains
        assert Config(A, W).override(op="conv", activation=spec).trains
    for observer in (None, MinMaxObserver, MinMaxObserver.with_args(eps=1e-3), partial(MinMaxObserver), made):
        assert not Config(weight=QuantizationSpec(observer=observer)).trains
    made.trains = True  # type: ignore[attr-defined]
    assert Config(weight=QuantizationSpec(observer=made)).trains
    assert not Config(A, W).keep_float(op="conv").trains


def test_presets() -> None:
    static = presets.int8_static()
    assert static.activation == QuantizationSpec(torch.uint8, PerTensor(), symmetric=False, quant_min=0, quant_max=255)
    assert static.weight == QuantizationSpec(torch.int8, PerChannel(0), quant_min=-127, quant_max=127)
    assert static.compute_dtype == "auto"
    token, tensor = presets.int8_dynamic(), presets.int8_dynamic("tensor", compute_dtype=None)
    assert token.activation == QuantizationSpec(torch.int8, PerToken(), dynamic=True)
    assert tensor.activation == QuantizationSpec(torch.uint8, PerTensor(), symmetric=False, dynamic=True)
    assert tensor.compute_dtype is None
    assert presets.int8_weight_only().activation is None
    assert presets.int8_weight_only(group_size=64).weight == QuantizationSpec(torch.int8, PerGroup(64))


def test_get_preset() -> None:
    assert presets.get("int8_dynamic") == presets.int8_dynamic()
    config = Config(A, W)
    assert presets.get(config) is config
    with pytest.raises(ConfigError) as error:
        presets.get("int8_statc")
    assert str(error.value) == (
        "There is no preset 'int8_statc' (did you mean 'int8_static'?)\n"
        "  to do: use one of int8_static, int8_dynamic, int8_weight_only, int8_qat"
    )
    with pytest.raises(InputError) as input_error:
        presets.get(8)  # type: ignore[arg-type]
    assert str(input_error.value).startswith("A config is a Config or the name of a preset, not int")
    with pytest.raises(ConfigError, match="int8_dynamic knows no granularity 'tokens'"):
        presets.int8_dynamic("tokens")  # type: ignore[arg-type]
