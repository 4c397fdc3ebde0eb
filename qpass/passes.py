"""Passes and pipelines: derive from `Pass` to write a pass, and extend one of the standard pipelines by it.

::

    pipeline = qpass.passes.prepare_pipeline("int8_static", "x86").before("insert_observers", MyPass())
    prepared = qpass.prepare(model, inputs, pipeline=pipeline)
"""

from qpass.ir.editor import Editor
from qpass.ir.graph_pass import Pass, PassResult
from qpass.ir.pipeline import PassRun, Pipeline
from qpass.ir.plain_form import normalization_pipeline
from qpass.quantize.pipelines import convert_pipeline, lower_pipeline, prepare_pipeline

__all__ = [
    "Editor", "Pass", "PassResult", "PassRun", "Pipeline", "convert_pipeline", "lower_pipeline",
    "normalization_pipeline", "prepare_pipeline",
]  # fmt: skip
