"""The pages of `docs/` are true: their code runs, names and tables are those of qpass, and the site builds."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpass
from qpass.inspect.saved import FORMAT
from qpass.ir.record import record_of
from qpass.targets import registry

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

CHAPTERS = (("how-to/pattern.md", "how-to/kernel.md", "how-to/target.md"),)
"""Pages that go on from one another; every other page stands alone."""


def page(name: str) -> str:
    return (DOCS / name).read_text()


def chapters() -> Iterator[tuple[str, ...]]:
    """All pages with code in Python, together where one goes on from another."""
    yield from CHAPTERS
    alone = sorted(file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md"))
    yield from ((name,) for name in alone if "```python" in page(name) and not any(name in some for some in CHAPTERS))


def run(names: tuple[str, ...], compiling: bool) -> None:
    """Run the blocks of the pages in order; an error shows the page and the line in it."""
    namespace: dict[str, Any] = {"__name__": "docs"}
    for name in names:
        text = page(name)
        for block in re.finditer(r"^```python(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE):
            if "compiles" not in block[1] or compiling:
                lines_before = text.count("\n", 0, block.start(2))
                exec(compile("\n" * lines_before + block[2], str(DOCS / name), "exec"), namespace)


@pytest.mark.parametrize("names", list(chapters()), ids=lambda names: names[0])
def test_the_code_of_a_page_runs(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_given", {})  # the targets of the pages are gone afterwards
    run(names, compiling=False)


@pytest.mark.slow
def test_the_tutorial_compiles() -> None:
    run(("tutorial.md",), compiling=True)


def test_the_stability_page_lists_the_public_names_and_the_format() -> None:
    text = page("stability.md")
    listed = text.partition("The names of `qpass` itself:")[2].partition(".\n")[0]
    assert re.findall(r"`(\w+)`", listed) == sorted(qpass.__all__)
    assert f"It is **{FORMAT}**." in text


def test_the_reference_has_every_public_name() -> None:
    given = {
        name
        for file in (DOCS / "reference").glob("*.md")
        for name in re.findall(r"^::: (\S+)$", file.read_text(), re.MULTILINE)
    }
    last = {name.rpartition(".")[2] for name in given}
    elsewhere = {
        "QpassError",
        "QpassWarning",
        "ops",
        "patterns",
    }  # in qpass.errors; operators and patterns are not calls
    assert set(qpass.__all__) - last == elsewhere
    assert "qpass.errors" in given


# Presets


class OneOfEach(nn.Module):
    """One layer of each island of the catalogue, behind what makes it pay."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.matrix = nn.Embedding(8, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))
        self.conv, self.other = nn.Conv2d(4, 16, 3), nn.Conv2d(4, 16, 3)

    def forward(self, index: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        left, right = self.conv(x), self.other(x)
        pooled = nn.functional.avg_pool2d(self.conv(x + 1), 2)
        return self.embedding(index), self.linear(x[..., :8]), x[..., :8] @ self.matrix, left * right, pooled


@pytest.fixture(scope="module")
def quantized() -> dict[str, set[str]]:
    """For each preset the islands that are quantized in such a model."""
    found = {}
    for name in qpass.presets.PRESETS:
        inputs = (torch.zeros(2, 3, dtype=torch.long), torch.randn(2, 4, 8, 8))
        prepared = qpass.prepare(OneOfEach().train("qat" in name), inputs, config=name)
        assert isinstance(prepared, torch.fx.GraphModule)
        records = (record_of(node) for node in prepared.graph.nodes)
        found[name] = {record.pattern for record in records if record and record.outcome == "quantized"}
    return found


@pytest.mark.parametrize("name", list(qpass.presets.PRESETS))
def test_the_table_of_a_preset_says_what_is_quantized(name: str, quantized: dict[str, set[str]]) -> None:
    rows = re.findall(r"^\| (`.*`) \| (quantized|in float) \|", page(f"presets/{name}.md"), re.MULTILINE)
    said = {island: outcome == "quantized" for names, outcome in rows for island in re.findall(r"`(\w+)`", names)}
    said.pop("add")  # a sum behind a convolution is an epilogue of it
    assert said == {island: island in quantized[name] for island in said}
    assert set(said) == {"linear", "matmul", "conv", "embedding", "mul", "avg_pool"}


# The site


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    missing = [name for name in ("mkdocs", "material", "mkdocstrings_handlers") if not importlib.util.find_spec(name)]
    if missing:
        pytest.skip(f"the extra docs is not installed ({', '.join(missing)} is missing): pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    assert 'id="qpass.prepare"' in (tmp_path / "reference" / "calls.html").read_text()
    loads = [
        file.name
        for file in tmp_path.rglob("*.html")
        if re.search(r"(src|href)=\"https?://[^\"]*\.(js|css)", file.read_text())
    ]
    assert loads == []


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text().partition("nav:")[2]))
    assert listed == {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
