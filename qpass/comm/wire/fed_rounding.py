"""Rounding with error feedback: what it takes from a tensor is added to the next tensor in its place.

    encode_fed(x, form, state)      v = float32(x) + unit * residual -> encode(v), as `qpass::encode` does it,
                                    and residual becomes (v - decode(encode(v))) / unit
    cast_fed(x, dtype, state)       v = x + unit * residual -> v in dtype, and residual becomes (v - v in dtype) / unit

The sum over many steps of what was sent is then that of what should have been, but for the last residual. The unit is
the loss scale, if there is one, else 1. A `Feedback` holds the residuals by ``state``. Where a value or its block is
not finite, it was not sent: the residual waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.comm.wire.feedback import Residual, residual_of
from qpass.comm.wire.format import WireFormat
from qpass.comm.wire.operators import check_encode, cuts, decode_into, encode_into


def encode_fed_into(x: Tensor, residual: Residual, payload: Tensor, wire: WireFormat) -> None:
    """Write the payload of ``x`` and its residual to ``payload``, and what it lacks to the residual; all are flat."""
    for part, coded in cuts(x.numel(), wire):
        values = torch.add(x[part].to(torch.float32), residual.values[part], alpha=residual.unit)
        encode_into(values, payload[coded], wire)
        decoded = torch.empty_like(values)
        decode_into(payload[coded], decoded, wire)
        _keep(values.sub_(decoded), residual, part)


def _keep(error: Tensor, residual: Residual, part: slice) -> None:
    """Keep what rounding took; an error is not finite where nothing was sent."""
    kept = residual.values[part]
    if residual.unit != 1.0:
        error.div_(residual.unit)
    if error.device.type == "cpu" and error.sum().isfinite():  # a mask takes longer than all the rest
        kept.copy_(error)
    else:
        torch.where(error.isfinite(), error, kept, out=kept)


def encode_fed(x: Tensor, form: str, state: str) -> Tensor:
    """The payload of ``x`` and its residual, in the format of `qpass::encode`; a new uint8 tensor of one dimension."""
    wire = check_encode(x, form)
    payload = torch.empty(wire.payload_bytes(x.numel()), dtype=torch.uint8, device=x.device)
    encode_fed_into(x.detach().reshape(-1), residual_of(state, x), payload, wire)
    return payload


def cast_fed(x: Tensor, dtype: torch.dtype, state: str) -> Tensor:
    """``x``, float32, and its residual as ``dtype``; a new contiguous tensor of the same shape."""
    residual = residual_of(state, x)
    values = torch.add(x.detach().reshape(-1), residual.values, alpha=residual.unit)
    result = values.to(dtype)
    _keep(values.sub_(result), residual, slice(None))
    return result.view(x.shape)


# Two calls give two payloads, so it is tagged as random numbers are: compilers neither merge nor repeat them.
_library = torch.library.Library("qpass", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded, torch.Tag.cudagraph_unsafe)
_library.define("encode_fed(Tensor x, str form, str state) -> Tensor", tags=_TAGS)
_library.define("cast_fed(Tensor x, ScalarType dtype, str state) -> Tensor", tags=_TAGS)
_library.impl("encode_fed", encode_fed, "CompositeExplicitAutograd")
_library.impl("cast_fed", cast_fed, "CompositeExplicitAutograd")


@torch.library.register_fake("qpass::encode_fed", lib=_library)
def _encode_fed_meta(x: Tensor, form: str, state: str) -> Tensor:
    return x.new_empty(check_encode(x, form).payload_bytes(x.numel()), dtype=torch.uint8)


@torch.library.register_fake("qpass::cast_fed", lib=_library)
def _cast_fed_meta(x: Tensor, dtype: torch.dtype, state: str) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)
