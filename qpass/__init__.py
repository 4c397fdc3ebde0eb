"""A quantizing compiler pass for PyTorch: ``prepare``, calibrate, ``convert``, ``torch.compile(backend="qpass")``."""

from qpass import comm, observer, ops, passes, patterns, presets
from qpass.api import calibrate, convert, lower, prepare
from qpass.backend import backend
from qpass.config import Config
from qpass.errors import QpassError
from qpass.inspect.report import report
from qpass.inspect.sqnr import sqnr
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec

__version__ = "0.1.0"

__all__ = [
    "Config", "PerChannel", "PerGroup", "PerTensor", "PerToken", "QpassError", "QuantizationSpec", "backend",
    "calibrate", "comm", "convert", "lower", "observer", "ops", "passes", "patterns", "prepare", "presets", "report",
    "sqnr",
]  # fmt: skip
