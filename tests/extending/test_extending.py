"""A package of its own extends qpass, installed beside it and without one edit in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `used.py` prints in a process of its own, with the package installed into a folder on its path."""
    source, installed = tmp_path_factory.mktemp("source") / "package", tmp_path_factory.mktemp("installed")
    copytree(HERE / "package", source)  # building leaves files beside the sources
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    found = subprocess.run([*install, "--target", str(installed), str(source)], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    path = os.pathsep.join([str(installed), *filter(None, [os.environ.get("PYTHONPATH")])])
    used = subprocess.run(
        [sys.executable, str(HERE / "used.py")], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert used.returncode == 0, used.stderr
    told: dict[str, Any] = json.loads(used.stdout.splitlines()[-1])
    return told


def test_prepare_sees_the_island_where_a_target_has_a_kernel_for_it(said: dict[str, Any]) -> None:
    assert said["prepared"]["addcmul"][0] == "quantized"
    outcome, _, reason = said["plain x86"]["addcmul"]
    assert (outcome, reason) == ("float", "no pattern of the catalogue covers it")


def test_lowering_and_report_name_the_kernel_and_diff_shows_it(said: dict[str, Any]) -> None:
    assert said["lowered"]["addcmul"][:2] == ["lowered", "qpass_extension.addcmul"]
    assert said["lowered"]["linear"][:2] == ["lowered", "onednn.qlinear"]
    assert "qpass_extension.addcmul" in said["diff"]
    assert said["sqnr"] > 30


def test_compiling_uses_the_target_that_the_model_was_prepared_for(said: dict[str, Any]) -> None:
    assert said["compiled for"] == "x86_with_addcmul"
    assert said["compiled"]["addcmul"][:2] == ["lowered", "qpass_extension.addcmul"]
    # The linear's result is rounded to 8 bits; at a tie its code differs by one, which is a step of about 0.02.
    assert said["distance"] < 0.05


def test_a_whole_target_is_found_by_its_entry_point(said: dict[str, Any]) -> None:
    assert said["toy's name"] == "toy"
    assert said["toy"]["linear"][:2] == ["lowered", "toy.linear"]
    assert said["toy"]["addcmul"][:2] == ["lowered", "qpass_extension.addcmul"]
    assert said["toy"]["sigmoid"][0] == "float"


def test_a_pass_in_the_prepare_pipeline_runs_and_is_recorded_and_reported(said: dict[str, Any]) -> None:
    assert said["clamped"]
    assert said["recorded"]["clamp_inputs"] == 1
    assert list(said["recorded"]).index("clamp_inputs") == list(said["recorded"]).index("annotate") - 1
    assert "1 inputs are clamped to 0.5" in said["notes"]
    assert "not done by clamp_inputs: the bias: it is not clamped" in said["notes"]
    assert said["operations clamped in prepare"]["linear"][0] == "quantized"


def test_what_a_pass_of_ones_own_inserts_is_no_lost_operation_of_the_model(said: dict[str, Any]) -> None:
    assert "unaccounted" not in {outcome for outcome, _, _ in said["clamped in convert"].values()}


def test_an_observer_of_ones_own_chooses_the_scale(said: dict[str, Any]) -> None:
    assert said["observers"] == ["HalfRange"]
    # Half the range over 255 steps; the ends lie on both sides of zero, so nothing widens it.
    assert said["scale times codes over range"] == pytest.approx(0.5, rel=1e-5)
