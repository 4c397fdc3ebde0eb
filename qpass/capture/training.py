"""Capture for training: the graph of evaluation, with a mark on each operator that training changes.

The model is traced in evaluation mode and once more in training mode. Both traces must be the same operators in the
same order; what may differ is whether dropout drops, whose statistics a batch norm uses, and whether a random mask or
noise is drawn and applied (`qpass.capture.branches`). A model that does anything else in training (an auxiliary loss,
another layer) has no single graph, and is refused by the line where it differs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, ShapesCollection

from qpass.capture.branches import insert_branches
from qpass.capture.choices import choices_refused, decided_by_value, warn_of_regions
from qpass.capture.errors import refuse_model
from qpass.capture.export import TRACING, batch_shapes, capture, export_model
from qpass.capture.graph_comparison import pair_operators
from qpass.capture.inputs import example_of, fresh_tensors, resize_batch, tensors_of
from qpass.capture.restored_reads import restore_reads
from qpass.errors import CaptureError, InputError
from qpass.ir.alias import aliased_inputs
from qpass.ir.guard import symbol_of
from qpass.ir.match import normalized, set_arguments
from qpass.ir.normalize import draws_random_numbers, functionalize_inplace
from qpass.ir.region_edits import inline_set_grad
from qpass.ir.regions import regions
from qpass.ir.source import module_path, where
from qpass.ir.text import target_name
from qpass.ir.training_modules import BY_MODE, DROPOUT, FLAGGED, TrainingChange, TrainingModule
from qpass.torch_private import BatchNorm as _BatchNorm

aten = torch.ops.aten

FLAGS: dict[Any, tuple[str, Any]] = {
    **dict.fromkeys(DROPOUT, ("train", False)),
    aten.scaled_dot_product_attention.default: ("dropout_p", 0.0),
    aten.batch_norm.default: ("training", False),
    **{operator: (name, False) for operator, name in FLAGGED.items()},
}
"""What an operator's argument for training is called, and its value in evaluation."""

IN_PLACE = {
    aten.rrelu_.default: aten.rrelu.default,
    **{getattr(aten, f"{name}_").default: operator for operator, name in DROPOUT.items()},
}
"""Random operators that work in place, each with its functional form."""


def capture_training(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> fx.GraphModule:
    """The graph of ``capture(model.eval())`` with ``meta[BY_MODE]``, a `TrainingChange`, on what training changes.

    The model's modes are switched for the traces and put back; its weights and statistics stay as they are.

    Args: as of :func:`qpass.capture.capture`.

    Raises:
        CaptureError: as `capture`; or the model computes something else in training than dropout and batch norm
            account for; or it holds a SyncBatchNorm.
        InputError: the model is not an ``nn.Module`` with both modes, or the example inputs are missing.
    """
    if isinstance(model, (ExportedProgram, fx.GraphModule)):
        raise InputError(
            f"training needs the nn.Module itself, and this {type(model).__name__} was traced in one mode",
            hint="pass the model that it was traced from",
        )
    refuse_model(model)
    refuse_synchronized(model)
    inputs = fresh_tensors(example := example_of(example_inputs, kwargs, model))
    with TRACING, modes_kept(model) as training:
        with own_backwards() as lost, choices_refused(type(model).__name__):
            try:
                trains, held = trace_training(model, several(inputs), None)
            except CaptureError as error:
                export_model(model.eval(), *several(inputs), None)  # this trace fails alike, or training is at fault
                raise (decided_by_value(error) if "data-dependent" in str(error) else error) from error.__cause__
        if lost:
            warnings.warn(
                f"qpass trains {', '.join(lost)} by the gradient of what its forward computes: a graph holds no "
                "backward of a torch.autograd.Function. Where it differs, as for rounding, write it with detach: "
                "x + (f(x) - x).detach()",
                stacklevel=3,
            )
        model.eval()

        def amend(gm: fx.GraphModule) -> None:
            mark_modes(gm, trains, lambda: trace_again(gm, model, example, dynamic_shapes), model, training, held)

        gm = capture(model, example_inputs, kwargs=kwargs, dynamic_shapes=dynamic_shapes, amend=amend, trains=True)
    warn_of_regions(gm)
    return gm


def refuse_synchronized(model: nn.Module) -> None:
    """Raise CaptureError for a SyncBatchNorm, whose statistics need collectives that the graph cannot hold."""
    for path, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise CaptureError(
                "SyncBatchNorm cannot be trained quantized: its statistics are exchanged between processes",
                where=path,
                hint="use BatchNorm and train with larger batches, or freeze its statistics: "
                "replace it by a BatchNorm of the same state and call qpass.fake_quantize.freeze_batch_norm_stats",
            )


@contextmanager
def own_backwards() -> Iterator[list[str]]:
    """The names of the model's own ``torch.autograd.Function`` classes that are applied inside this context."""
    found: dict[str, None] = {}
    apply = torch.autograd.Function.__dict__["apply"]

    def named(cls: type, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith(("torch.", "qpass.")):
            found[cls.__qualname__] = None
        return apply.__get__(None, cls)(*args, **kwargs)

    names: list[str] = []
    torch.autograd.Function.apply = classmethod(named)  # type: ignore[method-assign,assignment]
    try:
        yield names
    finally:
        torch.autograd.Function.apply = apply  # type: ignore[method-assign]
        names.extend(found)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[dict[str, bool]]:
    """Whether each module is in training mode, by path; put back at the end."""
    flags = {module: module.training for module in model.modules()}
    try:
        yield {path: module.training for path, module in model.named_modules(remove_duplicate=False)}
    finally:
        for module, flag in flags.items():
            module.training = flag


def several(inputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """The inputs with a batch of 2 where theirs is 1."""
    batch = next((x.shape[0] for x in tensors_of(inputs) if x.dim()), None)
    return resize_batch(inputs, 1, 2) if batch == 1 else inputs


def trace_training(model: nn.Module, inputs: tuple[Any, Any], dynamic_shapes: Any) -> tuple[fx.GraphModule, set[str]]:
    """The trace in training mode, with batch norms in evaluation mode: their modules say what training changes.

    Also returns the paths of the modules that the model's own ``train()`` leaves in evaluation mode.
    """
    model.train()
    held = {path for path, module in model.named_modules(remove_duplicate=False) if not module.training}
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return export_model(model, *inputs, dynamic_shapes, gradients=True).module(check_guards=False), held


def trace_again(gm: fx.GraphModule, model: nn.Module, example: tuple[Any, Any], dynamic_shapes: Any) -> fx.GraphModule:
    """The trace in training mode with the symbolic sizes of ``gm``, the trace in evaluation mode.

    Raises:
        CaptureError: training fixes a size that evaluation leaves open.
    """
    inputs = example if isinstance(dynamic_shapes, ShapesCollection) else fresh_tensors(example)
    if dynamic_shapes is None and any(map(symbol_of, input_sizes(gm))):
        inputs = several(inputs)
        dynamic_shapes = batch_shapes(inputs)
    trains, _ = trace_training(model, inputs, dynamic_shapes)
    model.eval()
    for ours, theirs in zip(input_sizes(gm), input_sizes(trains), strict=True):
        if symbol_of(ours) is not None and symbol_of(theirs) is None:
            raise CaptureError(
                f"the model takes inputs of any size in evaluation and only of size {theirs} in training",
                where=type(model).__name__,
                hint="write what it does in training for any size, or pass dynamic_shapes that fix the size",
            )
    return trains


def input_sizes(gm: fx.GraphModule) -> list[int | torch.SymInt]:
    """The sizes of all inputs of a trace, in order."""
    vals = (node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder"))
    return [size for val in vals if isinstance(val, torch.Tensor) for size in val.shape]


def mark_modes(
    gm: fx.GraphModule, trains: fx.GraphModule, again: Callable[[], fx.GraphModule], model: nn.Module,
    training: Mapping[str, bool], held: Set[str],
) -> None:  # fmt: skip
    """Mark each operator of ``gm``, traced in evaluation, whose twin in ``trains`` has another flag.

    Where the two are not the same operators, ``again`` gives the trace whose random branches go into ``gm``.
    """
    ours, theirs = set_aside_flags(gm), set_aside_flags(trains)
    restore_reads(gm, trains)
    twins, difference = pair_operators(gm, trains)
    modules = dict(model.named_modules(remove_duplicate=False))
    if difference is not None:
        for node, flag in ours.items():
            set_flag(node, flag)
        trains = again()
        for trace in (gm, trains):
            inline_set_grad(trace, trains=True)
            functionalize_inplace(trace)
        drawn = set(filter(draws_random_numbers, trains.graph.nodes))
        ours, theirs = set_aside_flags(gm), set_aside_flags(trains)

        def finish(node: fx.Node) -> None:
            if node in theirs:
                set_flag(node, theirs[node])

        twins, drawing = insert_branches(gm, trains, drawn, finish)
        for call, draw in drawing.items():
            path = module_path(draw)
            call.meta[BY_MODE] = TrainingChange(training.get(path, model.training), alone=is_alone(modules.get(path)))
    for node, flag in ours.items():
        set_flag(node, flag)
        path = module_path(node)
        owner = modules.get(path)
        trains_now = training.get(path, model.training)
        other = theirs.get(twins.get(node, node), flag)
        name = FLAGS[node.target][0]
        if isinstance(owner, _BatchNorm) and owner.track_running_stats and not flag:
            mean = normalized(node)["running_mean"]  # of a module with two names the graph knows one
            holder = str(mean.target).rpartition(".")[0] if mean.op == "get_attr" else path
            tracked = f"{holder}.num_batches_tracked".removeprefix(".")
            count = owner.num_batches_tracked
            tracked = "" if count is None else tracked
            node.meta[BY_MODE] = TrainingChange(
                trains_now, momentum=owner.momentum, tracked=tracked, count=count, held=path in held, kind=type(owner)
            )
        elif other == flag:
            continue
        elif node.target in FLAGGED:
            node.meta[BY_MODE] = TrainingChange(trains_now)
        elif name == "training":
            node.meta[BY_MODE] = TrainingChange(trains_now, momentum=normalized(twins[node])["momentum"])
        elif name == "dropout_p":
            node.meta[BY_MODE] = TrainingChange(trains_now, p=other)
            set_flag(node, other)
        else:
            node.meta[BY_MODE] = TrainingChange(trains_now, p=normalized(node)["p"], alone=is_alone(owner))
            set_flag(node, True)


def is_alone(module: nn.Module | None) -> bool:
    """Whether a module of the model holds no other module and no tensors."""
    return module is not None and not (module._modules or module._parameters or module._buffers)


def set_aside_flags(gm: fx.GraphModule) -> dict[fx.Node, Any]:
    """Give every operator of `FLAGS` the flag of evaluation; returns the old flags. In-place dropout becomes plain."""
    had: dict[fx.Node, Any] = {}
    for region in regions(gm):
        for node in region.graph.nodes:
            if node.target in IN_PLACE:
                source = node.args[0]
                if len(source.users) > 1 or aliased_inputs(source):
                    raise CaptureError(
                        f"{target_name(node)} overwrites a value that is read elsewhere", where=where(node),
                        hint="use dropout with inplace=False",
                    )  # fmt: skip
                node.target = IN_PLACE[node.target]
            if node.target in FLAGS:
                name, off = FLAGS[node.target]
                had[node] = normalized(node)[name]
                set_flag(node, off)
    return had


def set_flag(node: fx.Node, value: Any) -> None:
    """Write an operator's flag."""
    set_arguments(node, **{FLAGS[node.target][0]: value})


def in_modes_of(model: nn.Module, gm: fx.GraphModule) -> fx.GraphModule:
    """``gm`` in training mode if ``model`` is, its training modules in the modes that they were captured with."""
    kept = {module: module.training for module in gm.modules() if isinstance(module, TrainingModule)}
    gm.train(model.training)
    for module, training in kept.items():
        module.training = training
    return gm
