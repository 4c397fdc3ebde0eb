from __future__ import annotations

import ast
import pickle
from collections.abc import Iterator

import pytest

from house import ROOT
from qpass.errors import ConfigError, InputError, QpassError, near


def test_message_says_what_where_and_what_to_do() -> None:
    error = ConfigError("It broke.", where="encoder.fc1", hint="mend it")
    assert str(error) == "It broke.\n  where: encoder.fc1\n  to do: mend it"
    assert str(QpassError("It broke.", hint="mend it")) == "It broke.\n  to do: mend it"
    assert str(QpassError("It broke.")) == "It broke."


def test_errors_travel_between_processes_whole() -> None:
    error = pickle.loads(pickle.dumps(ConfigError("It broke.", where="here", hint="mend it")))
    assert (type(error), error.what, error.where, error.hint) == (ConfigError, "It broke.", "here", "mend it")


def test_errors_are_also_the_builtin_kinds() -> None:
    assert issubclass(InputError, TypeError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("int8_statc", " (did you mean 'int8_static'?)"), ("INT8_STATIC", " (did you mean 'int8_static'?)"), ("zzz", "")],
)
def test_near(name: str, expected: str) -> None:
    assert near(name, ["int8_static", "fp8"]) == expected


def messages(source: str) -> Iterator[tuple[int, str]]:
    """Line and source of the sentence and of the hint of each error that `source` raises."""
    for call in ast.walk(ast.parse(source)):
        name = getattr(call.func, "id", getattr(call.func, "attr", "")) if isinstance(call, ast.Call) else ""
        if isinstance(call, ast.Call) and name.endswith(("Error", "Refusal")):
            hints = [keyword.value for keyword in call.keywords if keyword.arg == "hint"]
            yield from ((part.lineno, ast.unparse(part)) for part in [*call.args[:1], *hints])


def test_sentences_of_errors_end_without_a_stop() -> None:
    """The lines ``where`` and ``to do`` follow them."""
    files = [file for name in ("qpass", "patterns") for file in (ROOT / name).rglob("*.py")]
    found = [f"{file.name}:{line}: {text}" for file in files for line, text in messages(file.read_text())]
    assert len(found) > 200
    assert [text for text in found if text.endswith((".'", '."')) and not text.endswith(("..'", '.."'))] == []
