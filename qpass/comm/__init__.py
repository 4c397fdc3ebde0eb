"""Communication in fewer bytes: codecs, and `torch.distributed`'s collectives over coded payloads."""

from __future__ import annotations

from qpass.comm.eager.agreement import debug
from qpass.comm.eager.auto_quantize import DQuantType, auto_quantize
from qpass.comm.eager.calibrate import calibrate_link
from qpass.comm.eager.collectives import all_gather, all_reduce, all_to_all, broadcast, reduce_scatter
from qpass.comm.eager.work import Work
from qpass.comm.policy.collective_override import Override
from qpass.comm.policy.cost import Decision, Link, decide
from qpass.comm.policy.policy import Policy
from qpass.comm.training.ddp_hooks import ddp_hook
from qpass.comm.training.fsdp import compress_fsdp
from qpass.comm.training.quantization_hooks import quantization_perchannel_hook, quantization_pertensor_hook
from qpass.comm.wire.codec import Codec, codec
from qpass.comm.wire.feedback import Feedback

__all__ = [
    "Codec", "DQuantType", "Decision", "Feedback", "Link", "Override", "Policy", "Work", "all_gather", "all_reduce",
    "all_to_all", "auto_quantize", "broadcast", "calibrate_link", "codec", "compress_fsdp", "ddp_hook", "debug",
    "decide", "quantization_perchannel_hook", "quantization_pertensor_hook", "reduce_scatter",
]  # fmt: skip
