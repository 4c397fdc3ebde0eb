"""Files of models: Python inputs are constants of the graph, in the file as well; the format has a number."""

from __future__ import annotations

import json
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from pipeline_run import STATIC, same
from qpass.errors import InputError
from qpass.inspect.saved import FORMAT, open_program
from qpass.ir.record import NodeRecord

X = torch.randn(4, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, gain: float = 1.0, flag: bool = False, kind: str = "plain",
        power: int = 1, pair: tuple[Tensor, float] | None = None,
    ) -> Tensor:  # fmt: skip
        y = self.fc(x) * gain**power
        y = y.abs() if flag else y
        y = y if mask is None else y * mask
        y = y if pair is None else y + pair[0] * pair[1]
        return y if kind == "plain" else -y


@pytest.mark.parametrize(
    ("kwargs", "other"),
    [
        ({"gain": 2.0}, {"gain": 3.0}),
        ({"flag": True}, {"flag": False}),
        ({"mask": None}, {"mask": torch.ones(8)}),
        ({"kind": "negated"}, {"kind": "plain"}),
        ({"power": 2, "gain": 2.0}, {"power": 3, "gain": 2.0}),
        ({"mask": torch.rand(8), "gain": 0.5, "flag": True}, {"mask": torch.rand(8), "gain": 0.5, "flag": False}),
        ({"pair": (torch.rand(8), 0.5)}, {"pair": (torch.rand(8), 0.25)}),
    ],
)
@torch.no_grad()
def test_python_inputs_are_saved_as_the_constants_that_they_are(
    kwargs: dict[str, Any], other: dict[str, Any], tmp_path: Path
) -> None:
    prepared = qpass.prepare(Model().eval(), (X,), kwargs=kwargs, config=STATIC)
    prepared(X, **kwargs)
    quantized = qpass.convert(prepared)
    qpass.save(quantized, tmp_path / "model.pt2")
    loaded = qpass.load(tmp_path / "model.pt2")
    for x in (X, X[:1], torch.randn(9, 8)):
        assert same(loaded(x, **kwargs), quantized(x, **kwargs))
    for model in (quantized, loaded):
        with pytest.raises((RuntimeError, ValueError, TypeError, AssertionError)):
            model(X, **other)


# The format and its number

FIRST = (
    {"format", "stage", "target", "float_bytes", "notes"},
    {"op", "outcome", "reason", "pattern", "kernel", "module", "line", "compute_dtype", "size", "asked", "group"},
)
LAYOUTS = {
    1: FIRST,
    2: (FIRST[0] | {"weight_bytes", "weight_bytes_kept"}, FIRST[1] | {"float_bytes"}),
}
"""What each format writes: the keys of the file beside the program, and the fields of the record of a node."""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt2"
    prepared = qpass.prepare(nn.Sequential(nn.Linear(8, 8)).eval(), (X,), config="int8_dynamic")
    qpass.save(qpass.convert(prepared), path)
    return path


def beside(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if name.endswith("qpass.json"))
        found: dict[str, Any] = json.loads(archive.read(name))
    return found


def rewritten(path: Path, **changes: Any) -> Path:
    """A copy of the file with other values beside the program; None takes a key away. No program is touched."""
    told = {key: value for key, value in {**beside(path), **changes}.items() if value is not None}
    other = path.with_name("other.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for info in source.infolist():
            target.writestr(info, json.dumps(told) if info.filename.endswith("qpass.json") else source.read(info))
    return other


def test_a_file_says_its_format_and_holds_the_layout_of_that_format(saved: Path) -> None:
    """When this fails, a key or a field has changed: raise FORMAT, add its layout, and read the older ones."""
    keys, names = LAYOUTS[FORMAT]
    assert beside(saved)["format"] == FORMAT
    assert set(beside(saved)) == keys
    assert {field.name for field in fields(NodeRecord)} == names


@pytest.mark.parametrize("wrong", [FORMAT + 1, 0, "next"])
def test_a_file_of_another_format_is_one_error_before_torch_opens_it(
    wrong: Any, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opens(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("torch opens the file")

    other = rewritten(saved, format=wrong)
    monkeypatch.setattr(torch.export, "load", opens)
    for read in (qpass.load, lambda path: qpass.diff(path, path)):
        with pytest.raises(InputError) as refused:
            read(other)
        assert str(refused.value) == (
            f"{str(other)!r} has format {wrong!r}, and this qpass reads formats 1 to {FORMAT}\n"
            "  to do: install the qpass that wrote the file, or a newer one; or save the model again with this one"
        )


@torch.no_grad()
def test_a_file_from_before_formats_is_read_as_the_first(saved: Path) -> None:
    loaded = qpass.load(rewritten(saved, format=None, **dict.fromkeys(LAYOUTS[FORMAT][0] - FIRST[0])))
    assert same(loaded(X), qpass.load(saved)(X))
    assert "1 of 1 quantized" in str(qpass.report(loaded))


def test_a_file_that_qpass_did_not_write_has_no_format(tmp_path: Path) -> None:
    torch.export.save(torch.export.export(nn.Linear(8, 8), (X,)), tmp_path / "plain.pt2")
    assert open_program(tmp_path / "plain.pt2").graph_module.meta["qpass.json"] == {}
