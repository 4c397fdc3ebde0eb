"""The wheel that a user gets: its files, its imports without extras, its types, and the backend that torch finds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

from house import MODULES, ROOT

OPTIONAL = ("matplotlib", "nncf", "onnx", "onnxruntime", "openvino", "rich", "sklearn", "torchao", "transformers")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of the sources, built away from the repository: a `build/` left there would lend the wheel its files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    for name in ("qpass", "patterns"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def run_elsewhere(cwd: Path, *command: str, path: Path | None = None) -> str:
    """Standard output of `python COMMAND` in folder `cwd`, with `path` as its PYTHONPATH or none at all."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    ran = subprocess.run([sys.executable, *command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_the_wheel_holds_every_module(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    stems = [name.replace(".", "/") + "/__init__" * (file.stem == "__init__") for name, file in MODULES.items()]
    assert held == {f"{stem}.py" for stem in stems} | {"qpass/py.typed"}


def test_the_wheel_imports_from_another_folder_without_extras(unpacked: Path, tmp_path: Path) -> None:
    script = f"""
import importlib, json, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # importing one of them raises
files = {{name: importlib.import_module(name).__file__ for name in {sorted(MODULES)!r}}}
import torch
assert not torch.distributed.is_initialized()
print(json.dumps(files))
"""
    files = json.loads(run_elsewhere(tmp_path, "-c", script, path=unpacked).splitlines()[-1])
    assert [name for name, file in files.items() if not Path(file).is_relative_to(unpacked)] == []


def test_the_wheel_is_typed_with_the_catalogue_in_its_place(unpacked: Path, tmp_path: Path) -> None:
    """In the repository mypy reads `patterns/` under that name; only here does it see `qpass.patterns`, as users do."""
    options = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path), "--no-warn-unused-ignores"]
    run_elsewhere(unpacked, "-m", "mypy", *options, "--package", "qpass")


def test_torch_finds_the_backend_without_importing_qpass(tmp_path: Path) -> None:
    script = """
import sys, torch
assert "qpass" in torch._dynamo.list_backends()
assert "qpass" not in sys.modules
assert callable(torch._dynamo.lookup_backend("qpass"))
"""
    run_elsewhere(tmp_path, "-c", script)
