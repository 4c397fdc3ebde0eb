"""``torch.compile(model, backend="qpass")``: quantized islands become int8 kernels, Inductor compiles the rest."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import fx

from qpass import torch_private
from qpass.arithmetic.decompositions import table
from qpass.backend.compilations import is_first, modules_of, program_compiled_now, remember
from qpass.backend.compiled_collectives import CompiledCollectives, parameters_of
from qpass.backend.inductor import compile_lowered, compile_plain
from qpass.capture.dynamo import from_dynamo, real_arguments
from qpass.comm.policy.policy import Policy, policy
from qpass.comm.wire.codec import Codec
from qpass.errors import ConfigError, QpassError, QpassWarning, StrictError, near
from qpass.ir.observer import Observer
from qpass.ir.pipeline import Pipeline
from qpass.ir.plain_form import normalize
from qpass.ir.record import GRAPH_KEY, GraphRecord, graph_record
from qpass.ir.regions import regions
from qpass.ir.source import module_stack
from qpass.ir.straight_through import make_differentiable
from qpass.quantize.lower import lower_graph
from qpass.quantize.passes.recognise_islands import RecogniseIslands, float_bytes
from qpass.quantize.stages import convert_graph, prepare_graph
from qpass.spec import QuantizationSpec, presets
from qpass.spec.config import Config
from qpass.spec.fake_quantize import FakeQuantizeBase
from qpass.targets import AUTO, Target, for_graph
from qpass.torch_private import is_traceable_wrapper_subclass

log = logging.getLogger(__name__)

_SET_GRAD = torch_private.set_grad_enabled

AUTOCAST = (
    "torch.autocast is on, and would cast what the int8 kernels stand for: call it outside of torch.autocast; "
    "compute_dtype of the config says in which dtype the rest is computed"
)
"""Why a graph is compiled as it is under ``torch.autocast``: so its results have the dtypes of the eager model."""

EXACT = {"emulate_precision_casts": True}
"""Inductor rounds to bfloat16 where the graph says so, also between operations that it fuses into one loop."""


@dataclass(frozen=True)
class Backend:
    """A backend for ``torch.compile``; equal settings compare equal, so they do not recompile.

    A converted model is lowered. Where a call asks for gradients, its q/dq graph is compiled instead, and they pass
    straight through rounding. A float model without gradients is quantized by ``config``, which must not need
    calibration. With gradients it is compiled as it is, with a warning unless it is in training mode or ``comm`` is
    given. A float model without a config is compiled as it is, without a warning. ``inductor`` are options for
    Inductor's own configuration, for this compilation alone; a ``mode`` of torch.compile stands for some of them.
    ``comm`` says which collectives are compressed, in the forward graph and in the backward one.
    """

    config: Config | None
    target: str | Target = AUTO
    strict: bool = False
    inductor: tuple[tuple[str, Any], ...] = ()
    comm: Policy | None = None

    def __call__(
        self, gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Any = None
    ) -> Callable[..., Any]:
        if options:
            raise ConfigError(
                "torch.compile was given options beside a backend that has its own",
                hint='give them to qpass.backend(...), or use backend="qpass"',
            )
        if mode is not None:
            modes = torch_private.list_mode_options()
            if mode not in modes:
                raise ConfigError(f"unknown mode {mode!r}{near(mode, modes)}", hint=f"use {', '.join(modes)}")
            inductor = modes[mode] | dict(self.inductor)
            return replace(self, inductor=tuple(sorted(inductor.items())))(gm, example_inputs)
        if torch.is_grad_enabled() and _runs_without_gradients(gm):
            with torch.no_grad():
                return torch.no_grad()(self(gm, example_inputs))
        training = _is_training(example_inputs)
        in_float = training or (self.config is None and not _has_qdq(gm))
        why = self._why_in_float(gm, example_inputs, training)
        if why:
            self._leave_in_float(why)
            in_float = True
        if in_float:
            log.info("compute is left in floating point")
            if make_differentiable(gm):
                exact = tuple(sorted({**EXACT, **dict(self.inductor)}.items()))
                return replace(self, config=None, inductor=exact)(gm, example_inputs)
            if self.comm is None:
                return compile_plain(gm, example_inputs, (), dict(self.inductor))
            collectives = self._collectives(gm, self.comm, training)
            patches = {**EXACT, **dict(self.inductor)}
            call = collectives.compiled(
                lambda inner: compile_plain(gm, example_inputs, [collectives.step], patches, inner)
            )
            remember(None, parameters_of(real_arguments(example_inputs)), collectives)
            return call
        captured = from_dynamo(gm, example_inputs)
        normalize(captured.graph_module)
        lowered = lower_graph(self._quantized(captured.graph_module), strict=self.strict)
        positions = list(captured.bindings.values())
        weights = [captured.arguments[index] for index in positions]
        settings: dict[str, Any] = {
            "capture": captured, "decompositions": table(), "config_patches": {**EXACT, **dict(self.inductor)},
        }  # fmt: skip
        if self.comm is None:
            kept = remember(lowered, weights)
            return kept.noting(compile_lowered(lowered, example_inputs, **settings), positions)
        collectives = self._collectives(gm, self.comm, training)
        call = collectives.compiled(
            lambda inner: compile_lowered(
                lowered, example_inputs, post_grad=[collectives.step], inner=inner, **settings
            )
        )
        return remember(lowered, weights, collectives).noting(call, positions)

    def _why_in_float(self, gm: fx.GraphModule, example_inputs: Sequence[Any], training: bool) -> str:
        """Why a graph that should be lowered, or quantized by the configuration, cannot be; "" for all others."""
        if _has_qdq(gm) or self.config is None:
            return AUTOCAST if _has_qdq(gm) and not training and torch.is_autocast_enabled("cpu") else ""
        observers = _observers(gm)
        if needs_calibration(self.config) and not observers:
            raise ConfigError(
                "a static configuration needs calibration, and a float model was given to the backend",
                hint="use qpass.prepare, calibrate and convert first, or the presets int8_dynamic or int8_weight_only",
            )
        if observers and not (training and any(issubclass(kind, FakeQuantizeBase) for kind in observers)):
            return "the model is prepared and not converted: call qpass.convert on it, and compile the result"
        if training and self.comm is None and not observers and not _is_in_training_mode():
            return "gradients are on: call it under torch.no_grad(), or qpass.convert a prepared model and compile that"
        if not training and torch.is_autocast_enabled("cpu"):
            return AUTOCAST
        if not training and (kind := _wrapped(example_inputs)):
            return f"its tensors are of {kind}, which only AOTAutograd takes apart, behind our capture"
        return ""

    def _leave_in_float(self, why: str) -> None:
        if self.strict:
            raise StrictError(why, hint="give comm and no config, or compile without strict=True")
        if is_first(why):
            warnings.warn(f"qpass left a compiled graph in float: {why}", QpassWarning, stacklevel=3)

    def _collectives(self, gm: fx.GraphModule, comm: Policy, training: bool) -> CompiledCollectives:
        backward = torch_private.compiled_autograd.in_compiled_autograd_region
        return CompiledCollectives(gm, comm, self.strict, backward, training)

    def _quantized(self, graph: fx.GraphModule) -> fx.GraphModule:
        if _has_qdq(graph):
            return accounted(graph, self.target)
        assert self.config is not None
        try:
            return convert_graph(prepare_graph(graph, self.config, self.target, partial=True))
        except QpassError as error:
            if self.strict:
                raise StrictError(error.what, where=error.where, hint=error.hint) from error
            if is_first(error.what):
                told = f"qpass left a compiled graph in float: {error.what}\n  where: {error.where}"
                warnings.warn(told, QpassWarning, stacklevel=2)
            return accounted(graph, self.target)


def backend(
    config: Config | str | None = None,
    *,
    target: str | Target = AUTO,
    strict: bool = False,
    inductor: Mapping[str, Any] | None = None,
    comm: str | Codec | Policy | Mapping[str, Any] | None = None,
) -> Backend:
    """A checked backend: ``torch.compile(model, backend=qpass.backend("int8_dynamic"))``.

    ``comm`` is the codec of the collectives, a :class:`qpass.comm.Policy`, or a dict of its arguments; the ``comm`` of
    a config says the same. A float model without ``config`` is quantized by ``int8_dynamic``; where ``comm`` is given,
    only its collectives are compressed.

    Raises:
        ConfigError: an unknown preset, codec, argument or Inductor option, or two different ``comm``.
    """
    if config is None and comm is None:
        config = presets.int8_dynamic()
    chosen = presets.get(config) if config is not None else None
    wanted = policy(comm) if comm is not None else None
    if chosen is not None and chosen.comm is not None:
        if wanted not in (None, policy(chosen.comm)):
            raise ConfigError("comm is given twice, and the config's is another", hint="give it in one place")
        wanted, chosen = policy(chosen.comm), replace(chosen, comm=None)
        if chosen == Config():
            chosen = None
    options = dict(inductor or {})
    known = torch_private.inductor_config.get_config_copy()
    for name in options:
        if name not in known:
            raise ConfigError(f"unknown Inductor option {name!r}{near(name, known)}", hint="see torch._inductor.config")
    return Backend(chosen, target, strict, tuple(sorted(options.items())), wanted)


def qpass_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point behind ``backend="qpass"``; ``options`` are the arguments of :func:`backend`."""
    given = dict(options or {})
    known = [field.name for field in fields(Backend)]
    for name in given:
        if name not in known:
            hint = f"use {', '.join(known)}"
            if name in torch_private.inductor_config.get_config_copy():
                hint = f"it is Inductor's: options={{'inductor': {{{name!r}: ...}}}}"
            raise ConfigError(f"unknown option {name!r}{near(name, known)}", hint=hint)
    return backend(**given)(gm, example_inputs, mode=mode)


def accounted(graph: fx.GraphModule, target: str | Target) -> fx.GraphModule:
    """A retraced graph at the quantized stage, with a record on every operation, as ``prepare`` leaves it."""
    chosen = for_graph(graph, (prepared_for() or AUTO) if target == AUTO else target)
    record = graph_record(graph)
    record.target = chosen.name
    record.float_bytes = float_bytes(regions(graph))
    recognise = RecogniseIslands(chosen)
    Pipeline("quantized", (recognise,)).run(graph)
    record.weight_bytes, record.weight_bytes_kept = record.float_bytes, recognise.weights.kept
    return graph


def prepared_for() -> str:
    """The target that the models compiled now were prepared for, by name; "" where there are several or none."""
    held = [part for module in modules_of(program_compiled_now()) for part in module.modules()]
    records = [part.meta.get(GRAPH_KEY) for part in held if isinstance(part, fx.GraphModule)]
    names = {record.target for record in records if isinstance(record, GraphRecord) and record.stage == "quantized"}
    return names.pop() if len(names) == 1 else ""


def needs_calibration(config: Config) -> bool:
    """Whether some activation's range comes from data seen beforehand."""
    specs = [config.activation, *(override.activation for override in config.overrides)]
    return any(isinstance(spec, QuantizationSpec) and not spec.dynamic for spec in specs)


def _is_training(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs)


def _runs_without_gradients(gm: fx.GraphModule) -> bool:
    """Whether a graph computes only while gradients are switched off. Then its switches are removed."""
    switches = gm.graph.find_nodes(op="call_function", target=_SET_GRAD)
    enabled = True
    for node in gm.graph.nodes:
        if node in switches:
            enabled = node.args[0]
        elif enabled and node.op not in ("placeholder", "get_attr", "output"):
            return False
    if not switches or not enabled:  # gradients stay off after it
        return False
    for node in switches:
        gm.graph.erase_node(node)
    gm.recompile()
    return True


def _observers(gm: fx.GraphModule) -> set[type]:
    """The types of the observers that a graph was traced through; none in a float model."""
    stacks = (module_stack(node) for region in regions(gm) for node in region.graph.nodes)
    kinds = (kind for stack in stacks for _, kind in stack)
    return {kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Observer)}


def _is_in_training_mode() -> bool:
    return any(module.training for module in modules_of(program_compiled_now()))


def _wrapped(example_inputs: Sequence[Any]) -> str:
    """The type of a tensor that holds other tensors, as a DTensor does; "" where all are plain."""
    return next((type(value).__name__ for value in example_inputs if is_traceable_wrapper_subclass(value)), "")


def _has_qdq(gm: fx.GraphModule) -> bool:
    return any(
        getattr(node.target, "namespace", "") == "quantized_decomposed"
        for region in regions(gm) for node in region.graph.nodes
    )  # fmt: skip
