"""Communication in fewer bytes: codecs, and `torch.distributed`'s collectives over coded payloads."""

from __future__ import annotations

from qpass.comm.agreement import debug
from qpass.comm.auto_quantize import DQuantType, auto_quantize
from qpass.comm.calibrate import calibrate_link
from qpass.comm.codec import Codec, codec
from qpass.comm.collectives import all_gather, all_reduce, all_to_all, broadcast, reduce_scatter
from qpass.comm.cost import Decision, Link, decide
from qpass.comm.ddp_hooks import ddp_hook
from qpass.comm.fsdp import compress_fsdp
from qpass.comm.override import Override
from qpass.comm.policy import Policy
from qpass.comm.quantization_hooks import quantization_perchannel_hook, quantization_pertensor_hook
from qpass.comm.work import Work
from qpass.ops.feedback import Feedback

__all__ = [
    "Codec", "DQuantType", "Decision", "Feedback", "Link", "Override", "Policy", "Work", "all_gather", "all_reduce",
    "all_to_all", "auto_quantize", "broadcast", "calibrate_link", "codec", "compress_fsdp", "ddp_hook", "debug",
    "decide", "quantization_perchannel_hook", "quantization_pertensor_hook", "reduce_scatter",
]  # fmt: skip
