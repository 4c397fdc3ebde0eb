"""A quantizing compiler pass for PyTorch: ``prepare``, calibrate, ``convert``, ``torch.compile(backend="qpass")``."""

from qpass import comm, fake_quantize, observer, ops, passes, patterns, presets, targets
from qpass.api import calibrate, convert, lower, prepare
from qpass.backend import backend
from qpass.errors import QpassError, QpassWarning
from qpass.inspect.diff import diff
from qpass.inspect.record import record
from qpass.inspect.report import report
from qpass.inspect.sqnr import sqnr
from qpass.io import load, save
from qpass.spec import PerChannel, PerGroup, PerTensor, PerToken, QuantizationSpec
from qpass.spec.config import Config

__version__ = "0.1.0"

__all__ = [
    "Config", "PerChannel", "PerGroup", "PerTensor", "PerToken", "QpassError", "QpassWarning", "QuantizationSpec",
    "backend", "calibrate", "comm", "convert", "diff", "fake_quantize", "load", "lower", "observer", "ops", "passes",
    "patterns", "prepare", "presets", "record", "report", "save", "sqnr", "targets",
]  # fmt: skip
