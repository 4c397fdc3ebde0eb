"""what happened, where, what to do: every error of qpass says these three, and nothing else is raised on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QpassError(Exception):
    """The base of all errors that qpass raises on purpose.

    Args:
        what: one sentence that says what happened.
        where: the place it concerns: a module path, a node, a source line, a file.
        hint: what to do about it, as an instruction.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where: {self.where}")
        if self.hint is not None:
            lines.append(f"  to do: {self.hint}")
        return "\n".join(lines)


class InputError(QpassError, TypeError):
    """An argument of a public function has a type or a form that the function does not take."""


class ConfigError(QpassError, ValueError):
    """A config, a spec, a preset or an option is wrong in itself, or names something that does not exist."""


class CaptureError(QpassError):
    """The model could not be turned into a graph."""


class CalibrationError(QpassError):
    """An observer cannot do its work: it saw no data, or data that it cannot observe."""


class ConvertError(QpassError):
    """The prepared graph cannot become a quantized one."""


class LowerError(QpassError):
    """The quantized graph cannot be lowered to the target's kernels."""


class StateError(QpassError, RuntimeError):
    """A state dict does not fit the model that it is loaded into."""


class VerifyError(QpassError):
    """A graph breaks the written rules of its stage: a defect of a pass, not of the caller."""


class AgreementError(QpassError, RuntimeError):
    """Ranks that must make the same call made different ones, or one of them made none."""


class VersionError(QpassError, ImportError):
    """The installed torch lacks something of its own that qpass uses."""


class StrictError(QpassError):
    """Something that was asked for was not done, and the caller asked for strictness."""


class QpassWarning(UserWarning):
    """Something was asked of qpass that it did not do, and went on without: filter it as any category of warnings."""


def near(name: str, names: Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the known name most like `name`, or ``""`` when none is like it.

    Letter case does not count. The answer starts with a space, so it can be put straight behind the wrong name.
    """
    known = {candidate.lower(): candidate for candidate in names}
    best = difflib.get_close_matches(name.lower(), known, n=1)
    return f" (did you mean {known[best[0]]!r}?)" if best else ""
