"""The names of operators that overrides take, through `prepare`: the catalogue's, the report's and ATen's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qpass
from pipeline_run import Do
from qpass.errors import ConfigError
from qpass.presets import int8_static

X = torch.randn(2, 3, 8, 8)


def net() -> nn.Module:
    parts = {"conv": nn.Conv2d(3, 4, 3), "fc": nn.Linear(144, 8), "w": nn.Parameter(torch.randn(8, 4))}
    forward = lambda m, x: torch.addmm(m.b, m.fc(m.conv(x).relu().flatten(1)), m.w)  # noqa: E731
    return Do(forward, **parts, b=nn.Parameter(torch.zeros(4))).eval()


def in_float(config: qpass.Config) -> set[str]:
    rows = qpass.report(qpass.prepare(net(), (X,), config=config)).rows
    return {row.op for row in rows if row.outcome == "float"}


@pytest.mark.parametrize(
    ("op", "expected"),
    [
        ("conv", {"conv2d"}), ("conv2d", {"conv2d"}), ("aten.conv2d", {"conv2d"}), ("conv2d.default", {"conv2d"}),
        ("aten.conv2d.default", {"conv2d"}), ("conv*", {"conv2d"}), ("aten.conv?d*", {"conv2d"}),
        ("linear", {"linear"}), ("aten.linear.default", {"linear"}), ("linear.default", {"linear"}),
        ("matmul", {"addmm"}), ("addmm", {"addmm"}), ("aten.addmm.default", {"addmm"}), ("add*", {"addmm"}),
        ("aten.*", {"conv2d", "linear", "addmm", "relu"}),
    ],
)  # fmt: skip
def test_an_operator_has_all_its_names(op: str, expected: set[str]) -> None:
    if op == "aten.*":
        with pytest.raises(ConfigError, match="nothing in this model can be quantized"):
            in_float(int8_static().keep_float(op=op))
        return
    # A relu behind a float convolution is a float operation of its own.
    assert in_float(int8_static().keep_float(op=op)) - {"relu"} == expected


def test_an_override_by_the_report_s_name_changes_the_spec() -> None:
    config = int8_static().override(op="addmm", activation=None)
    prepared = qpass.prepare(net(), (X,), config=config)
    prepared(X)
    ranges = {row.op: row for row in qpass.report(qpass.convert(prepared)).rows}
    assert ranges["addmm"].outcome == ranges["linear"].outcome == "quantized"
    plain = qpass.prepare(net(), (X,), config=int8_static())
    observers = [sum("activation_post_process" in name for name, _ in gm.named_children()) for gm in (prepared, plain)]
    assert observers[0] == observers[1] - 1


def test_an_operation_that_would_be_fused_is_named_like_any_other() -> None:
    """It is then one of its own, behind a quantized convolution without it."""
    prepared = qpass.prepare(net(), (X,), config=int8_static().keep_float(op="relu"))
    rows = {row.op: row for row in qpass.report(prepared).rows}
    assert (rows["conv2d"].outcome, rows["relu"].outcome, rows["relu"].fused) == ("quantized", "float", False)


@pytest.mark.parametrize(
    ("op", "hint"), [("conv2", "'conv2d'"), ("adm", "'addmm'"), ("aten.liner.default", "'aten.linear.default'")]
)
def test_a_wrong_name_is_answered_by_a_near_one(op: str, hint: str) -> None:
    with pytest.raises(ConfigError) as error:
        in_float(int8_static().keep_float(op=op))
    assert str(error.value).startswith(f"Override 0 (op={op!r}) matches nothing in this model (did you mean {hint}?)")
