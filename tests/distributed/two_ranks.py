"""Everything that needs a group of 2 ranks, in one pair of processes: starting them takes longer than the checks."""

from __future__ import annotations

import functools
from typing import Any

import torch

import qpass.comm
from distributed import auto_quantize_defects, fsdp_training
from on_ranks import on_ranks


def calibrated() -> tuple[Any, str]:
    """A link measured with tensors too small to compile kernels for, and what it decides."""
    qpass.comm.eager.calibrate.LARGE = 1 << 15
    link = qpass.comm.calibrate_link(codec="int4")
    return link, str(qpass.comm.decide("all_gather", 1 << 20, torch.float32, 2, qpass.comm.codec("int4"), link))


def everything() -> dict[str, Any]:
    return {
        "calibrated": calibrated(),
        "verdicts": auto_quantize_defects.verdicts("qpass"),
        "forms": auto_quantize_defects.forms(),
        "gradients": auto_quantize_defects.gradients(),
        "traceable": auto_quantize_defects.traceable(),
        "fsdp": fsdp_training.figures(),
        "torch": auto_quantize_defects.verdicts("torch"),  # last: it leaves other groups behind
    }


def two_ranks() -> list[dict[str, Any]]:
    """What `everything` found, rank by rank."""
    outcome = _outcome()
    if isinstance(outcome, AssertionError):
        raise outcome
    return outcome


@functools.cache
def _outcome() -> list[dict[str, Any]] | AssertionError:
    """Once for all tests, a failure too."""
    try:
        return on_ranks(2, everything)
    except AssertionError as error:
        return error
