"""Payloads that are joined and sent together.

    join_payloads(payloads, parts)           uint8 [parts * n], [parts * m], ..  ->  [parts * (n + m + ..)]
    cut_payloads(joined, parts, start, stop) -> [parts * (stop - start)]: some of the bytes of every part

``parts`` is 1 where every rank gets the same, else the ranks: what goes to one of them stays together. Both are calls,
as codecs are: these few bytes are copied in no time, while loops written for them are compiled anew with each program.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_library = torch.library.Library("qpass", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag,)
_library.define("join_payloads(Tensor[] payloads, int parts) -> Tensor", tags=_TAGS)
_library.define("cut_payloads(Tensor joined, int parts, SymInt start, SymInt stop) -> Tensor", tags=_TAGS)


def join_payloads(payloads: Sequence[Tensor], parts: int) -> Tensor:
    """The first part of every payload, then the second of every one, and so on; a payload may have any shape."""
    return torch.cat([payload.reshape(parts, -1) for payload in payloads], 1).view(-1)


def cut_payloads(joined: Tensor, parts: int, start: int, stop: int) -> Tensor:
    """The bytes from ``start`` to ``stop`` of every part, in a new tensor of one dimension."""
    cut = joined.view(parts, -1)[:, start:stop]
    return cut.clone(memory_format=torch.contiguous_format).view(-1)


@torch.library.register_fake("qpass::join_payloads", lib=_library)
def _join_meta(payloads: Sequence[Tensor], parts: int) -> Tensor:
    return payloads[0].new_empty(sum(payload.numel() for payload in payloads))


@torch.library.register_fake("qpass::cut_payloads", lib=_library)
def _cut_meta(joined: Tensor, parts: int, start: int, stop: int) -> Tensor:
    return joined.new_empty(parts * (stop - start))


for _name, _function in (("join_payloads", join_payloads), ("cut_payloads", cut_payloads)):
    _library.impl(_name, _function, "CompositeExplicitAutograd")

JOIN, CUT = torch.ops.qpass.join_payloads.default, torch.ops.qpass.cut_payloads.default
