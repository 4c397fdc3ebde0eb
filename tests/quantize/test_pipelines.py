from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qpass
from pipeline_run import Do, kernel_names
from qpass import passes
from qpass.errors import ConfigError, InputError
from qpass.ir.record import graph_record
from qpass.presets import int8_dynamic, int8_static
from qpass.targets import X86


def branches(m: nn.Module, x: Tensor) -> Tensor:
    return torch.tanh(m.a(x)) + torch.sigmoid(m.b(x))


MODEL = Do(branches, a=nn.Linear(8, 8), b=nn.Linear(8, 8)).eval()
X = torch.randn(3, 8)


def test_a_pipeline_brings_its_settings_along() -> None:
    config = int8_dynamic(compute_dtype=None)
    prepared = qpass.prepare(MODEL, (X,), pipeline=passes.prepare_pipeline(config, "x86"))
    assert graph_record(prepared).config == config
    assert graph_record(prepared).target == "x86"


def test_a_pipeline_for_something_else_is_refused() -> None:
    pipeline = passes.prepare_pipeline("int8_static", "x86")
    with pytest.raises(ConfigError, match="made with another config") as raised:
        qpass.prepare(MODEL, (X,), config="int8_dynamic", pipeline=pipeline)
    assert raised.value.hint == "give the config in one place: qpass.passes.prepare_pipeline(config, target)"
    with pytest.raises(ConfigError, match="made for the target 'x86', and 'another' is meant"):
        qpass.prepare(MODEL, (X,), target=X86.with_kernels({}, name="another"), pipeline=pipeline)
    with pytest.raises(ConfigError, match="to the prepared stage is needed, and this one leads to the quantized one"):
        qpass.prepare(MODEL, (X,), pipeline=passes.convert_pipeline())
    with pytest.raises(InputError, match="pipeline takes a Pipeline, not tuple"):
        qpass.prepare(MODEL, (X,), pipeline=pipeline.passes)  # type: ignore[arg-type]


def test_lower_runs_the_passes_that_are_left() -> None:
    config = int8_static(compute_dtype=None)
    prepared = qpass.prepare(MODEL, (X,), config=config)
    prepared(X)
    quantized = qpass.convert(prepared, pipeline=passes.convert_pipeline().without("hoist_casts"))
    assert kernel_names(qpass.lower(quantized)) == ["onednn.qlinear one GEMM"]
    alone = passes.lower_pipeline("x86").without("merge_siblings")
    assert kernel_names(qpass.lower(quantized, pipeline=alone)) == ["onednn.qlinear"] * 2
    with pytest.raises(ConfigError, match="made for the target 'x86', and 'other' is meant"):
        qpass.lower(quantized, target=X86.with_kernels({}, name="other"), pipeline=alone)


def test_a_strange_name_is_one_error_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no pass 'insert_observer' \(did you mean 'insert_observers'\?\)"):
        passes.prepare_pipeline("int8_static", "x86").without("insert_observer")
    with pytest.raises(ConfigError, match="unknown target 'x68'"):
        passes.lower_pipeline("x68")
