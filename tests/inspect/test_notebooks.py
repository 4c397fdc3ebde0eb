"""The notebooks of examples/ run from top to bottom and say what their committed outputs say."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NAMES = ("inspect_a_transformer", "find_the_costly_layer", "watch_a_collective")


def run(name: str) -> tuple[Any, Any]:
    """The notebook as committed, and executed anew in a kernel of its own."""
    import nbformat
    from nbclient import NotebookClient

    committed, notebook = (nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4) for _ in range(2))
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    return committed, notebook


@pytest.fixture(scope="module")
def executed() -> dict[str, tuple[Any, Any]]:
    for package in ("nbclient", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason=f"{package}, of the extras dev and viz, is not installed")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(NAMES, pool.map(run, NAMES), strict=True))


def texts(notebook: Any) -> list[str]:
    outputs = [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.get("name") != "stderr"
    ]
    return [output.get("text") or output["data"]["text/plain"] for output in outputs]


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_was_committed(name: str, executed: dict[str, tuple[Any, Any]]) -> None:
    """Word for word where it shows diffs and reports; of figures and times, that there are as many."""
    committed, notebook = (texts(one) for one in executed[name])
    assert len(committed) == len(notebook) > 3
    exact = [number for number, text in enumerate(committed) if text.startswith(("qpass diff", "qpass report"))]
    assert len(exact) >= 2
    assert [notebook[number] for number in exact] == [committed[number] for number in exact]


def test_the_costly_layer_is_found_and_fixed(executed: dict[str, tuple[Any, Any]]) -> None:
    said = texts(executed["find_the_costly_layer"][1])
    before, after = (float(text.split()[0]) for text in said if text.rstrip().endswith("dB") and text.count("dB") == 1)
    assert before < 20 < 35 < after
    assert next(text for text in said if "by itself" in text).startswith("2.down   linear")


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed_is_whole_and_inert(name: str) -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat, of the extra dev, is not installed")
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    assert all(cell.outputs or "import torch" in cell.source for cell in notebook.cells if cell.cell_type == "code")
    html = "".join(o["data"].get("text/html", "") for c in notebook.cells for o in c.get("outputs", ()) if "data" in o)
    assert "<details" in html
    assert not any(word in html for word in ("<script", "<style", "<svg", " id=", " onload="))
