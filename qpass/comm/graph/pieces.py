"""A collective of a graph in pieces: each is coded while others are on the wire, as the eager schedules do it.

    send_pieces(x, form, parts, pieces, world, group, state)     -> what each piece will have received, not waited for
    receive_pieces(received, numel, dtype, form, world, divisor) -> the sum over ranks [numel], or with divisor 0 the
                                                                    values of all ranks, one behind the other

``parts`` is 1 where every rank gets the same (an all_gather), else the ranks (an all_to_all of equal parts). A piece is
some of the rows of every part, so codes, scales and values are those of the whole tensor sent at once, bit for bit.
``state`` names the residual of what is sent with error feedback (`qpass.comm.wire.fed_rounding`), else it is "".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.comm.wire.fed_rounding import encode_fed_into
from qpass.comm.wire.feedback import Residual, residual_of
from qpass.comm.wire.format import parse
from qpass.comm.wire.operators import decode_into, decode_reduce_into, encode_into
from qpass.comm.wire.partition import cut

_library = torch.library.Library("qpass", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define(
    'send_pieces(Tensor x, str form, int parts, int pieces, int world, str group, str state="") -> Tensor[]', tags=_TAGS
)
_library.define(
    "receive_pieces(Tensor[] received, SymInt numel, ScalarType dtype, str form, int world, int divisor) -> Tensor",
    tags=_TAGS,
)


def send_pieces(
    x: Tensor, form: str, parts: int, pieces: int, world: int, group: str, state: str = ""
) -> list[Tensor]:  # fmt: skip
    """Code piece after piece and start its transfer; ``x`` may be overwritten as soon as this returns."""
    wire, functional = parse(form), torch.ops._c10d_functional
    sources = x.detach().reshape(parts, -1)
    found = residual_of(state, x) if state else None
    residuals = [None] * parts if found is None else [Residual(one, found.unit) for one in found.values.view(parts, -1)]
    received = []
    for start, stop in cut(sources.shape[1], pieces, wire):
        size = wire.payload_bytes(stop - start)
        payload = torch.empty(parts * size, dtype=torch.uint8, device=x.device)
        for source, residual, own in zip(sources, residuals, payload.view(parts, size), strict=True):
            piece = slice(start, stop)
            if residual is None:
                encode_into(source[piece], own, wire)
            else:
                encode_fed_into(source[piece], Residual(residual.values[piece], residual.unit), own, wire)
        if parts == 1:
            received.append(functional.all_gather_into_tensor(payload, world, group))
        else:
            received.append(functional.all_to_all_single(payload, [size] * world, [size] * world, group))
    return received


def receive_pieces(
    received: Sequence[Tensor], numel: int, dtype: torch.dtype, form: str, world: int, divisor: int
) -> Tensor:
    """Wait for one piece after the other, and decode it while the next is on its way."""
    wire = parse(form)
    out = torch.empty(numel, dtype=dtype, device=received[0].device)
    targets = out.view(1 if divisor else world, -1)
    for (start, stop), piece in zip(cut(targets.shape[1], len(received), wire), received, strict=True):
        payloads = torch.ops._c10d_functional.wait_tensor(piece).view(world, -1)
        if divisor:
            decode_reduce_into(payloads, out[start:stop], wire, divisor)
            continue
        for payload, target in zip(payloads, targets, strict=True):
            decode_into(payload, target[start:stop], wire)
    return out


@torch.library.register_fake("qpass::send_pieces", lib=_library)
def _send_meta(
    x: Tensor, form: str, parts: int, pieces: int, world: int, group: str, state: str = ""
) -> list[Tensor]:  # fmt: skip
    wire = parse(form)
    cuts = cut(x.numel() // parts, pieces, wire)
    return [x.new_empty(world * wire.payload_bytes(stop - start), dtype=torch.uint8) for start, stop in cuts]


@torch.library.register_fake("qpass::receive_pieces", lib=_library)
def _receive_meta(
    received: Sequence[Tensor], numel: int, dtype: torch.dtype, form: str, world: int, divisor: int
) -> Tensor:
    return received[0].new_empty(numel, dtype=dtype)


for _name, _function in (("send_pieces", send_pieces), ("receive_pieces", receive_pieces)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")

SEND, RECEIVE = torch.ops.qpass.send_pieces.default, torch.ops.qpass.receive_pieces.default
