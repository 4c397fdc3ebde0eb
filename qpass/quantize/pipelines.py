"""The standard pipelines of prepare, convert and lower: values that a user can extend."""

from __future__ import annotations

from qpass import targets
from qpass.comm.graph.passes.lower_collectives import LowerCollectives
from qpass.errors import ConfigError, InputError
from qpass.ir.graph_pass import Pass
from qpass.ir.pipeline import Pipeline
from qpass.ir.record import Stage
from qpass.quantize.passes.annotate import Annotate
from qpass.quantize.passes.assign_compute_dtype import AssignComputeDtype
from qpass.quantize.passes.carry_codes import CarryCodes
from qpass.quantize.passes.cast_compute_dtype import CastComputeDtype
from qpass.quantize.passes.expand_attention import ExpandAttention
from qpass.quantize.passes.fold_batch_norm import FoldBatchNorm
from qpass.quantize.passes.fold_constants import FoldConstants
from qpass.quantize.passes.hoist_casts import HoistCasts
from qpass.quantize.passes.insert_modes import InsertModes
from qpass.quantize.passes.insert_observers import InsertObservers
from qpass.quantize.passes.keep_strides import KeepStrides
from qpass.quantize.passes.lower_islands import LowerIslands
from qpass.quantize.passes.lower_observers import LowerObservers
from qpass.quantize.passes.merge_siblings import MergeSiblings
from qpass.quantize.passes.remove_modes import RemoveModes
from qpass.quantize.passes.set_dropout_aside import SetDropoutAside
from qpass.spec import presets
from qpass.spec.config import Config, resolve_compute_dtype
from qpass.targets import Target


def prepare_pipeline(config: Config | str, target: str | Target) -> Pipeline:
    """The passes from the captured to the prepared stage: they decide, by the catalogue, what is quantized.

    Raises:
        ConfigError: an unknown preset or target, with the nearest name.
    """
    config, target = presets.get(config), targets.get(target)
    dtype = resolve_compute_dtype(config, target.fast_dtype())
    casts = () if dtype is None else (AssignComputeDtype(dtype, target.expands_attention()),)
    passes: tuple[Pass, ...] = (SetDropoutAside(), Annotate(config, target), InsertObservers(), *casts, InsertModes())
    return Pipeline("prepared", passes)


def convert_pipeline() -> Pipeline:
    """The passes from the prepared to the quantized stage: observers become q/dq pairs."""
    passes = (
        RemoveModes(), FoldBatchNorm(), LowerObservers(),
        CastComputeDtype(), ExpandAttention(), HoistCasts(), KeepStrides(), FoldConstants(),
    )  # fmt: skip
    return Pipeline("quantized", passes)


def lower_pipeline(target: str | Target) -> Pipeline:
    """The passes from the quantized to the lowered stage: q/dq pairs become kernels of ``target``, exactly.

    Raises:
        ConfigError: an unknown target, with the nearest name.
    """
    target = targets.get(target)
    islands = (MergeSiblings(target), LowerIslands(target, target.missing()))
    return Pipeline("lowered", (LowerCollectives(), CarryCodes(), *islands, KeepStrides(), FoldConstants()))


def config_of(pipeline: Pipeline | None) -> Config | None:
    """The config that a pass of the pipeline was made with, None where none was."""
    found = (getattr(step, "config", None) for step in (pipeline.passes if pipeline else ()))
    return next((config for config in found if isinstance(config, Config)), None)


def target_of(pipeline: Pipeline | None) -> Target | None:
    """The target that a pass of the pipeline was made for, None where none was."""
    found = (getattr(step, "target", None) for step in (pipeline.passes if pipeline else ()))
    return next((target for target in found if isinstance(target, Target)), None)


def refuse_misfit(pipeline: Pipeline, stage: Stage, config: Config | None = None, target: Target | None = None) -> None:
    """Raise where a pipeline that somebody gave leads elsewhere, or was made for other settings than the ones given.

    Raises:
        InputError: it is no pipeline.
        ConfigError: it leads to another stage, or a pass has another config or target.
    """
    if not isinstance(pipeline, Pipeline):
        what = f"pipeline takes a Pipeline, not {type(pipeline).__name__}"
        raise InputError(what, hint=f"start from {_STARTS[stage]}")
    if pipeline.stage != stage or pipeline.foreign:
        raise ConfigError(
            f"a pipeline to the {stage} stage is needed, and this one leads to the {pipeline.stage} one",
            hint=f"start from {_STARTS[stage]}",
        )
    own_config, own_target = config_of(pipeline), target_of(pipeline)
    if config is not None and own_config not in (None, config):
        raise ConfigError(
            "the pipeline was made with another config than the one given",
            hint=f"give the config in one place: {_STARTS[stage]}",
        )
    if target is not None and own_target not in (None, target):
        raise ConfigError(
            f"the pipeline was made for the target {own_target.name!r}, and {target.name!r} is meant",
            hint=f"give the target in one place: {_STARTS[stage]}",
        )


_STARTS = {
    "prepared": "qpass.passes.prepare_pipeline(config, target)",
    "quantized": "qpass.passes.convert_pipeline()",
    "lowered": "qpass.passes.lower_pipeline(target)",
}
