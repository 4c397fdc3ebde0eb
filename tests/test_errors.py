from __future__ import annotations

import pickle

import pytest

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
