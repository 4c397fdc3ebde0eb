"""prepare, calibrate, convert, lower: the four calls."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from qpass.capture.errors import refuse_kind, refuse_model
from qpass.capture.export import FirstBatch, capture
from qpass.capture.training import capture_training, in_modes_of
from qpass.errors import ConfigError, ConvertError, InputError
from qpass.ir.observer import Observer
from qpass.ir.ownership import borrowed, forget_origin, own_tensors, own_written, tensors_in
from qpass.ir.pipeline import Pipeline
from qpass.islands.qparam_state import keep_qparams, refuse_state
from qpass.quantize.lower import lower_graph
from qpass.quantize.pipelines import config_of, refuse_misfit, target_of
from qpass.quantize.stages import convert_graph, prepare_graph
from qpass.spec import presets
from qpass.spec.config import Config
from qpass.spec.fake_quantize.spec_state import keep_specs
from qpass.targets import AUTO, Target


def prepare(
    model: torch.nn.Module | ExportedProgram,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    kwargs: dict[str, Any] | None = None,
    config: Config | str | None = None,
    dynamic_shapes: Any = None,
    target: str | Target = AUTO,
    pipeline: Pipeline | None = None,
) -> fx.GraphModule | FirstBatch:
    """Capture ``model`` and put observers where ``config`` and the catalogue say; nothing is rounded yet.

    With a config for training (``int8_qat``) they are fake-quantize modules: they round, the gradient passes straight
    through, and the result is trained. It follows ``.train()`` and ``.eval()`` as the model does: dropout, batch norm.

    Args:
        model: an ``nn.Module``, an ``ExportedProgram`` or a captured ``GraphModule``. It is not edited, and its weights
            are shared, not copied; for training they are copied, so that the model keeps its own. Buffers that it
            writes to, such as caches and counters, are copied: calibration leaves those of the model as they are.
        example_inputs: positional example inputs; without them the model is captured at the first batch it sees.
        kwargs: keyword example inputs.
        config: a :class:`Config`, a preset's name, or None for ``int8_static``.
        dynamic_shapes: as in ``torch.export.export``; by default dimension 0 of every tensor is dynamic where the
            model allows it.
        target: the target whose kernels decide what is worth quantizing, or its name; "auto" is the one that serves
            the device of the parameters.
        pipeline: the passes to run instead of ``qpass.passes.prepare_pipeline(config, target)``. Where ``config`` and
            ``target`` are left out, they are those that it was made with.

    Returns:
        A module that computes what ``model`` computes, bit for bit, and observes ranges meanwhile. For training: one
        that does so while fake-quantize is disabled, in the mode (training or evaluation) that the model is in.

    Raises:
        CaptureError, ConfigError, InputError
    """
    if pipeline is not None:
        refuse_misfit(pipeline, "prepared")
        config = config_of(pipeline) if config is None else config
        target = (target_of(pipeline) or AUTO) if target == AUTO else target
    chosen = presets.get(presets.int8_static() if config is None else config)
    if chosen.comm is not None:
        raise ConfigError(
            "comm is decided where a graph is compiled, and prepare was given a config with comm",
            hint='leave it out here, and give it to torch.compile(..., backend="qpass", options={"comm": ...})',
        )
    if isinstance(model, FirstBatch):
        raise InputError("the model is prepared already", hint="start again from the float model")
    if isinstance(model, torch.nn.DataParallel):  # paths in reports and overrides are those inside of it
        model = model.module
    refuse_kind(model)

    def build(model: Any, inputs: Any, kwargs: Any) -> fx.GraphModule:
        if not chosen.trains:
            captured = capture(model, inputs, kwargs=kwargs, dynamic_shapes=dynamic_shapes)
            own_written(prepared := prepare_graph(captured, chosen, target, pipeline=pipeline))
            return prepared
        captured = capture_training(model, inputs, kwargs=kwargs, dynamic_shapes=dynamic_shapes)
        trained = in_modes_of(model, prepare_graph(captured, chosen, target, pipeline=pipeline))
        keep_specs(trained)
        return trained

    no_inputs = example_inputs is None and kwargs is None
    if no_inputs and isinstance(model, torch.nn.Module) and not isinstance(model, fx.GraphModule):
        refuse_model(model)
        return FirstBatch(model, build)
    return build(model, example_inputs, kwargs)


def calibrate(prepared: torch.nn.Module, batches: Iterable[Any], *, progress: bool | None = None) -> torch.nn.Module:
    """Run ``prepared`` on each batch without gradients: a tensor, a tuple of arguments, or a mapping by keyword.

    ``progress`` None shows a bar on a terminal or in a notebook and is silent elsewhere. Returns ``prepared``.

    Raises:
        InputError: ``prepared`` observes nothing, ``batches`` is one batch and not several, or a batch does not fit
            the model's arguments, as one with labels does not.
    """
    from tqdm.auto import tqdm

    if not any(isinstance(module, FirstBatch | Observer) for module in prepared.modules()):
        raise InputError(
            f"calibrate takes a prepared model, and this {type(prepared).__name__} observes nothing",
            hint="call qpass.prepare on the model first",
        )
    if isinstance(batches, (torch.Tensor, Mapping)):
        raise InputError(
            f"calibrate takes an iterable of batches, and this is one {type(batches).__name__}",
            hint="pass a list of batches: [batch]",
        )
    with torch.no_grad():
        for batch in tqdm(batches, desc="calibrate", unit="batch", disable=None if progress is None else not progress):
            kwargs = dict(batch) if isinstance(batch, Mapping) else {}
            args = () if isinstance(batch, Mapping) else tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
            _refuse_misfit(prepared, args, kwargs)
            prepared(*args, **kwargs)
    return prepared


def convert(prepared: torch.nn.Module, *, strict: bool = False, pipeline: Pipeline | None = None) -> fx.GraphModule:
    """The quantized model: ``quantized_decomposed`` q/dq pairs, weights stored as integers; runs anywhere.

    The result is a frozen copy of the model as it is now. Codes are made once, what stays in float is copied, so its
    memory is that of the integers and of what stays in float; nothing follows the float model or ``prepared`` later.
    Buffers that the model writes to start from what they hold in the float model, not from what calibration left, and
    every conversion has its own; after training they start from what training left.

    ``state_dict()`` of the result holds its static scales and zero points as well (see `qpass.islands.qparam_state` for
    the keys). ``load_state_dict`` writes them into the graph, and compiled forms notice; a state of another
    configuration raises `StateError`, which names the keys.

    ``prepared`` stays as it is and can be calibrated further and converted again. ``pipeline`` is run instead of
    ``qpass.passes.convert_pipeline()``.

    Raises:
        ConfigError: the pipeline leads to another stage.
        ConvertError: ``prepared`` does not come from :func:`prepare`, or is converted already.
        CalibrationError: an observer saw no data.
        StrictError: ``strict`` and something that the configuration asked for is left in float.
    """
    graph = prepared.captured if isinstance(prepared, FirstBatch) else prepared
    if not isinstance(graph, fx.GraphModule):
        raise ConvertError(
            f"convert takes a prepared model, and this is a float {type(graph).__name__}",
            hint="call qpass.prepare on the model first, calibrate, then convert",
        )
    quantized = convert_graph(graph, strict=strict, pipeline=pipeline)
    own_tensors(quantized, tensors_in(graph), borrowed(graph))
    forget_origin(quantized)
    keep_qparams(quantized)
    return quantized


def lower(
    quantized: fx.GraphModule, *, target: str | Target = "", strict: bool = False, pipeline: Pipeline | None = None
) -> fx.GraphModule:
    """The lowered model: int8 kernels instead of q/dq islands; ``torch.compile(..., backend="qpass")`` does it too.

    The result is a copy, as that of :func:`convert` is: weights are packed, and everything else is copied. It loads no
    state dict: load that into ``quantized``, and lower again. ``pipeline`` is run instead of
    ``qpass.passes.lower_pipeline(target)``.

    Raises:
        ConfigError: the target is unknown, or the pipeline leads to another stage or was made for another target.
        LowerError: ``quantized`` does not come from :func:`convert`.
        StrictError: ``strict`` and some quantized operation has no kernel.
    """
    if not isinstance(quantized, fx.GraphModule):
        raise InputError(
            f"lower takes the result of convert, not {type(quantized).__name__}", hint="call qpass.convert first"
        )
    lowered = lower_graph(quantized, target, strict, pipeline)
    own_tensors(lowered, tensors_in(quantized))
    refuse_state(lowered)
    return lowered


def _refuse_misfit(prepared: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise InputError where a batch is not what ``forward`` takes; before the first batch that is not known."""
    captured = prepared.built if isinstance(prepared, FirstBatch) and prepared.built is not None else prepared
    try:
        inspect.signature(captured.forward).bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"a batch of calibrate does not fit the model's arguments: {error}",
            hint="a batch is what the model was captured with, without labels: "
            "calibrate(prepared, (inputs for inputs, labels in loader))",
        ) from error
