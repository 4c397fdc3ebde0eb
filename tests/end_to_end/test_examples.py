"""The examples do what they say, on the data they say, and say it in print."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quickstart(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which ships the digits, is not installed")
    figures = example("quickstart").main()
    printed = capsys.readouterr().out

    assert figures["accuracy"] > 95  # a net that learnt nothing loses nothing by quantization
    assert figures["points_lost"] <= 0.5  # the promise: 2 of 512 images
    # 8 bits under 10 scores of a net 6 layers deep: 30 to 45 dB; 20 dB would be noise a tenth as large as the scores
    assert 20 < figures["sqnr"] < 80
    assert "qpass report: lowered for x86" in printed
    assert "unaccounted" not in printed
    assert "fine.conv{1,2}" in printed or "fine.conv1" in printed
    assert f"SQNR        {figures['sqnr']:.1f} dB" in printed


@pytest.mark.slow  # fifteen epochs
def test_qat(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn", reason="scikit-learn, which ships the digits, is not installed")
    figures = example("qat").main()
    printed = capsys.readouterr().out

    before, after, trained = figures["float32"], figures["rounded after training"], figures["trained with rounding"]
    assert before > 90  # a net that learnt nothing loses nothing by rounding
    assert trained > after  # what the example is for
    assert trained > before - 2  # 10 of 512 images; how far a training gets varies with the CPU's order of summation
    assert f"trained with rounding    accuracy {trained:6.2f} %" in printed
    assert "qpass report: quantized for x86" in printed


@pytest.mark.slow  # three compilations
def test_transformer(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    figures = example("transformer").main()
    printed = capsys.readouterr().out

    # With random weights both lie near 35 dB; below 20 dB something is quantized wrongly, not coarsely.
    assert all(decibels > 20 for decibels in figures["sqnr"].values())
    assert set(figures["ms"]) == {"float32", "int8_dynamic", "int8_static"}
    assert printed.count("qpass report: lowered for x86") == 2
    assert "encoder.layer.{0..3}.attention.self.query x4" in printed
    assert "unaccounted" not in printed


def test_transformer_says_what_to_install(tmp_path: Path) -> None:
    """In a process of its own, where the package cannot be imported."""
    script = "import runpy, sys; sys.modules['transformers'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", script, str(EXAMPLES / "transformer.py")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1] == "this example needs the package transformers: pip install 'transformers>=5'"
