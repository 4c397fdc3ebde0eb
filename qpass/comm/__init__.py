"""Communication in fewer bytes: codecs, and `torch.distributed`'s collectives over coded payloads."""

from __future__ import annotations

from qpass.comm.agreement import debug
from qpass.comm.codec import Codec, codec
from qpass.comm.collectives import all_gather, all_reduce, all_to_all, broadcast, reduce_scatter
from qpass.comm.work import Work

__all__ = [
    "Codec", "Work", "all_gather", "all_reduce", "all_to_all", "broadcast", "codec", "debug", "reduce_scatter",
]  # fmt: skip
