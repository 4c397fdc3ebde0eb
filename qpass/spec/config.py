"""module path, module type, op -> which spec: the first override that matches wins, else the config's own hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any, Final, Literal

import torch

from qpass.errors import ConfigError, near
from qpass.spec import QuantizationSpec


class _Inherit(Enum):
    INHERIT = "INHERIT"

    def __repr__(self) -> str:
        return "INHERIT"


INHERIT: Final = _Inherit.INHERIT
"""As a spec of an override: take the config's own."""

SpecOrInherit = QuantizationSpec | None | Literal[_Inherit.INHERIT]
ComputeDtype = torch.dtype | Literal["auto", "bfloat16", "float16", "float32"] | None

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Override:
    """What holds in one part of the model. All conditions given must hold, and at least one must be given.

    Args:
        module: a glob on the module path (``"encoder.*.fc1"``; ``*`` also crosses dots). It holds for everything
            inside the module, too.
        module_type: a module class (its subclasses count), or its name, short (``"Linear"``) or full. It holds inside
            the module, too.
        op: a glob on a name of the operator: the catalogue's (``"linear"``, ``"conv"``, ``"matmul"``), the report's
            (``"conv2d"``, ``"addmm"``) or ATen's, whole or in part (``"aten.conv2d.default"``, ``"aten.conv2d"``).
        activation, weight: the spec, or None to leave the tensor in float, or INHERIT for the config's own.
    """

    module: str | None = None
    module_type: type | str | None = None
    op: str | None = None
    activation: SpecOrInherit = INHERIT
    weight: SpecOrInherit = INHERIT

    def __post_init__(self) -> None:
        if self.module is None and self.module_type is None and self.op is None:
            raise ConfigError(
                "An override names no module, module_type or op, so it would hold everywhere",
                hint="name what it is for, or change the config's own activation and weight",
            )
        _check_spec("Override activation", self.activation)
        _check_spec("Override weight", self.weight)

    def matches(self, module_paths: Sequence[tuple[str, type | str]], *ops: str) -> bool:
        """Whether this override holds for an operator with the names `ops` inside the modules `module_paths`
        (outermost first)."""
        if self.op is not None and not any(fnmatchcase(name, self.op) for op in ops for name in _op_names(op)):
            return False
        if self.module is None and self.module_type is None:
            return True
        return any(self._names(path, module_type) for path, module_type in module_paths)

    def _names(self, path: str, module_type: type | str) -> bool:
        if self.module is not None and not fnmatchcase(path, self.module):
            return False
        return self.module_type is None or _same_type(self.module_type, module_type)

    def __str__(self) -> str:
        module_type = self.module_type.__name__ if isinstance(self.module_type, type) else self.module_type
        given = {"module": self.module, "module_type": module_type, "op": self.op}
        return ", ".join(f"{key}={value!r}" for key, value in given.items() if value is not None)


@dataclass(frozen=True)
class Resolved:
    """What holds for one operator; `override_index` is the place of the override that said so, None for the config."""

    activation: QuantizationSpec | None
    weight: QuantizationSpec | None
    override_index: int | None


@dataclass(frozen=True)
class Config:
    """How a model is quantized: a frozen value, so equal configs compile once.

    Args:
        activation: spec of the activations, None to leave them in float.
        weight: spec of the weights, None to leave them in float.
        compute_dtype: dtype of what stays in float, or its name: None changes nothing, ``"auto"`` is what
            the target computes fast on this machine: bfloat16 on CPUs that have instructions for it.
        overrides: exceptions, the first that matches wins; add them with `override` and `keep_float`.
        comm: what the collectives of a compiled graph send: a codec's name or a `qpass.comm.Policy`. It is read by
            `qpass.backend`; `prepare` sees no collective, and refuses it.
    """

    activation: QuantizationSpec | None = None
    weight: QuantizationSpec | None = None
    compute_dtype: ComputeDtype = None
    overrides: tuple[Override, ...] = ()
    comm: Any = None

    def __post_init__(self) -> None:
        for name in ("activation", "weight"):
            if getattr(self, name) is INHERIT:
                raise ConfigError(f"Config {name} has nothing to inherit from: INHERIT belongs in an override")
            _check_spec(f"Config {name}", getattr(self, name))
        object.__setattr__(self, "compute_dtype", _checked_compute_dtype(self.compute_dtype))
        if isinstance(self.comm, Mapping):
            raise ConfigError("Config comm cannot be a dict", hint="write qpass.comm.Policy(...) with its items")
        object.__setattr__(self, "overrides", tuple(self.overrides))
        for override in self.overrides:
            if not isinstance(override, Override):
                raise ConfigError(f"Config overrides must be Override objects, not {override!r}")

    @property
    def trains(self) -> bool:
        """Whether some spec rounds while the model is trained: its observer is a fake-quantize module."""
        specs = [self.activation, self.weight]
        specs += [spec for one in self.overrides for spec in (one.activation, one.weight) if spec is not INHERIT]
        return any(spec is not None and spec.trains for spec in specs)

    def override(
        self,
        *,
        module: str | None = None,
        module_type: type | str | None = None,
        op: str | None = None,
        activation: SpecOrInherit = INHERIT,
        weight: SpecOrInherit = INHERIT,
    ) -> Config:
        """A config with one more override, tried after those it already has. Arguments as for `Override`."""
        return replace(self, overrides=(*self.overrides, Override(module, module_type, op, activation, weight)))

    def keep_float(
        self, *, module: str | None = None, module_type: type | str | None = None, op: str | None = None
    ) -> Config:
        """A config that leaves one more part of the model in float. Arguments as for `Override`."""
        return self.override(module=module, module_type=module_type, op=op, activation=None, weight=None)

    def resolve(self, module_paths: Sequence[tuple[str, type | str]], *ops: str) -> Resolved:
        """The specs for one operator.

        Args:
            module_paths: (path, class or full class name) of the modules around the operator, outermost first.
            ops: the operator's names, such as ``"conv"`` and ``"aten.conv2d.default"``.
        """
        for index, override in enumerate(self.overrides):
            if override.matches(module_paths, *ops):
                activation = self.activation if override.activation is INHERIT else override.activation
                weight = self.weight if override.weight is INHERIT else override.weight
                return Resolved(activation, weight, index)
        return Resolved(self.activation, self.weight, None)


def unmatched(
    config: Config,
    used_indices: Collection[int],
    known_paths: Iterable[str],
    known_ops: Iterable[str],
    known_types: Iterable[str] = (),
) -> ConfigError | None:
    """The error for overrides that matched nothing, with near names; None when all were used.

    Args:
        used_indices: the `override_index` of every `Resolved` that was taken.
        known_paths: all module paths of the model.
        known_ops: names of all operators of the model.
        known_types: names of all module classes of the model, short or full.
    """
    unused = [(index, override) for index, override in enumerate(config.overrides) if index not in used_indices]
    if not unused:
        return None
    paths = [path for path in known_paths if path]
    ops = sorted({name for op in known_ops for name in _op_names(op)})
    types = sorted({name.rpartition(".")[2] for name in known_types})
    lines = []
    for index, override in unused:
        given = ((override.module, paths), (_short_name(override.module_type), types), (override.op, ops))
        unknown = [(name, names) for name, names in given if name is not None and not _is_known(name, names)]
        hints = next((hint for name, names in unknown if (hint := near(name, names))), "")
        what = "matches nothing in this model" if unknown or not index else "matches nothing that no earlier one does"
        lines.append(f"override {index} ({override}) {what}{hints}")
    what = "; ".join(lines)
    return ConfigError(
        f"{what[0].upper()}{what[1:]}",
        hint="correct the name, or remove the override; the first match wins, so an earlier one may hide it",
    )


def resolve_compute_dtype(config: Config, fast: torch.dtype | None) -> torch.dtype | None:
    """The dtype for what stays in float; None leaves it alone. ``"auto"`` is what the target says is ``fast``."""
    given = fast if config.compute_dtype == "auto" else config.compute_dtype
    return _DTYPES[given] if isinstance(given, str) else given


def _op_names(op: str) -> tuple[str, ...]:
    """``"aten.linear.default"`` -> itself, ``"aten.linear"``, ``"linear.default"`` and ``"linear"``."""
    op = op.removeprefix("torch.ops.")
    parts = op.split(".")
    return (op, ".".join(parts[:2]), ".".join(parts[1:]), parts[1]) if len(parts) > 2 else (op, parts[-1])


def _is_known(name: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(known, name) for known in names)


def _same_type(wanted: type | str, found: type | str) -> bool:
    if isinstance(wanted, type) and isinstance(found, type):
        return issubclass(found, wanted)
    found_name = _full_name(found)
    if isinstance(wanted, type):
        return found_name == _full_name(wanted)
    return wanted in (found_name, found_name.rpartition(".")[2])


def _short_name(module_type: type | str | None) -> str | None:
    return None if module_type is None else _full_name(module_type).rpartition(".")[2]


def _full_name(module_type: type | str) -> str:
    return module_type if isinstance(module_type, str) else f"{module_type.__module__}.{module_type.__qualname__}"


def _check_spec(what: str, spec: object) -> None:
    if spec is not None and spec is not INHERIT and not isinstance(spec, QuantizationSpec):
        raise ConfigError(f"{what} must be a QuantizationSpec or None, not {spec!r}")


def _checked_compute_dtype(given: Any) -> torch.dtype | Literal["auto"] | None:
    if given is None or given == "auto":
        return given
    name = str(given).removeprefix("torch.")
    if name not in _DTYPES or not isinstance(given, str | torch.dtype):
        raise ConfigError(
            f"Config compute_dtype cannot be {given!r}{near(name, ('auto', *_DTYPES))}",
            hint="use 'auto', 'bfloat16', 'float16', 'float32' (or torch.bfloat16 and so on) or None",
        )
    return _DTYPES[name]
