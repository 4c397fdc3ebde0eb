"""``python -m qpass`` in processes of its own: what it prints, and each exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import fx, nn

import qpass
from qpass.__main__ import condition, main
from qpass.errors import InputError
from qpass.ir.text import graph_text

X = torch.linspace(-1, 1, 64).reshape(4, 16)


class Saved(NamedTuple):
    folder: Path
    quantized: fx.GraphModule


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """``float.pt2``, ``int8.pt2`` and the folder they are in."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4)).eval()
    program = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    prepared = qpass.prepare(program)
    with torch.no_grad():
        prepared(X)
    quantized = qpass.convert(prepared)
    qpass.save(program, folder / "float.pt2")
    qpass.save(quantized, folder / "int8.pt2")
    return Saved(folder, quantized)


def test_each_command_in_a_fresh_process(saved: Saved) -> None:
    commands = {
        "differ": ["diff", "float.pt2", "int8.pt2", "--html", "page.html"],
        "fail": ["diff", "float.pt2", "int8.pt2", "--json", "--fail-if", "added=quantized_decomposed.*"],
        "missing": ["report", "nowhere.pt2"],
    }

    def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-W", "ignore", "-m", "qpass", *arguments]
        return subprocess.run(command, cwd=saved.folder, capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        ran = dict(zip(commands, pool.map(run, commands.values()), strict=True))
    assert {name: process.returncode for name, process in ran.items()} == {"differ": 0, "fail": 1, "missing": 2}
    assert ran["differ"].stdout.startswith("qpass diff  float.pt2 -> int8.pt2\n")
    assert "- linear(x, weight, bias)\n" in ran["differ"].stdout
    assert "\x1b" not in ran["differ"].stdout
    assert "<details" in (saved.folder / "page.html").read_text()
    added = [node["operator"] for node in json.loads(ran["fail"].stdout)["added"]]
    assert "quantized_decomposed.quantize_per_tensor.default" in added
    assert ran["fail"].stderr.startswith("qpass: --fail-if added=quantized_decomposed.* holds for 6: ")
    assert ran["missing"].stderr.splitlines()[0] == "qpass: there is no file 'nowhere.pt2'"


def test_conditions(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(saved.folder / "float.pt2"), str(saved.folder / "int8.pt2")]
    assert main(["diff", *files, "--fail-if", "removed=aten.*"]) == 0
    assert main(["diff", *files, "--fail-if", "removed=aten.*", "--fail-if", "rewired=aten.linear"]) == 1
    assert main(["diff", *files, "--fail-if", "changed"]) == 1
    assert main(["diff", files[0], files[0], "--fail-if", "changed"]) == 0
    assert condition("added=aten.*") == ("added", "aten.*")
    capsys.readouterr()
    for wrong in ("aten.*", "gone=aten.*", "added="):
        with pytest.raises(SystemExit) as stopped:
            main(["diff", *files, "--fail-if", wrong])
        assert stopped.value.code == 2
        assert f"'{wrong}' is no condition: write added=aten.*, with added, removed" in capsys.readouterr().err


def test_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    told = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert (told["qpass"], told["torch"]) == (qpass.__version__, torch.__version__)


def test_a_strict_report(saved: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    page = saved.folder / "report.html"
    assert main(["report", str(saved.folder / "int8.pt2"), "--strict", "--json", "--html", str(page)]) == 0
    assert json.loads(capsys.readouterr().out)["stage"] == "quantized"
    assert "left in float" in page.read_text()
    assert main(["report", str(saved.folder / "int8.pt2")]) == 0
    assert capsys.readouterr().out == f"{qpass.report(saved.quantized)}\n"
    assert main(["report", str(saved.folder / "float.pt2")]) == 2
    assert "report takes a prepared, quantized or lowered graph" in capsys.readouterr().err


def test_help_says_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert "Exit codes: 0 all went well" in capsys.readouterr().out


# Saving and loading


def test_what_is_loaded_is_what_was_saved(saved: Saved) -> None:
    loaded = qpass.load(saved.folder / "int8.pt2")
    assert torch.equal(loaded(X), saved.quantized(X))
    assert torch.equal(loaded(X[:3]), saved.quantized(X[:3]))  # the batch is still dynamic
    assert str(qpass.report(loaded)) == str(qpass.report(saved.quantized))
    assert not qpass.diff(saved.quantized, loaded).op("aten.linear")
    lowered = qpass.lower(loaded)
    assert graph_text(lowered).count("onednn.") == graph_text(qpass.lower(saved.quantized)).count("onednn.")
    assert torch.equal(lowered(X), qpass.lower(saved.quantized)(X))


def test_a_program_of_anybody_is_loaded_as_captured(saved: Saved) -> None:
    loaded = qpass.load(saved.folder / "float.pt2")
    prepared = qpass.prepare(loaded, config="int8_dynamic")
    assert qpass.report(qpass.convert(prepared)).count("quantized") == 2


def test_what_cannot_be_saved(saved: Saved, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a lowered graph cannot be saved"):
        qpass.save(qpass.lower(saved.quantized), tmp_path / "x.pt2")
    with pytest.raises(InputError, match="save takes a graph, not Linear"):
        qpass.save(nn.Linear(2, 2), tmp_path / "x.pt2")  # type: ignore[arg-type]
    assert not (tmp_path / "x.pt2").exists()
