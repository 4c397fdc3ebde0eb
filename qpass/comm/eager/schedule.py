"""The schedules of collectives over payloads: pieces are coded while other pieces are on the wire.

    one-shot      encode -> all_gather payloads -> sum all of them                            (W - 1) N bytes a rank
    two-shot      encode -> all_to_all -> sum own part -> encode -> all_gather -> decode   2 (W - 1) / W N bytes a rank
    hierarchical  reduce_scatter inside -> one- or two-shot across -> all_gather inside     only 1 / inside goes across

N are the bytes of the payload. At W = 2 both shots send the same bytes and one-shot rounds once less. Every rank
decodes the same payloads in the same order, its own among them, so all results are equal bit for bit.

All functions work on contiguous tensors of one dimension; they return when the result is there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.comm.wire.codec import Codec
from qpass.comm.wire.operators import decode_into, decode_reduce_into, encode_into
from qpass.comm.wire.partition import cut, partition, pieces_of

ONE_SHOT_BYTES = 1 << 15
"""Payloads up to this size go one-shot at any W: two transfers of latency cost more than the bytes."""


def chunks(numel: int, codec: Codec) -> list[range]:
    """The element ranges that `numel` elements are cut into, each but the last a whole number of rows."""
    return [range(*ends) for ends in cut(numel, pieces_of(numel, codec), codec)] if numel else []


def shots(numel: int | torch.SymInt, codec: Codec, world: int) -> str:
    """ "one_shot" or "two_shot": what `all_reduce` does by itself. Depends on nothing that could differ by rank."""
    return "one_shot" if world == 2 or codec.payload_bytes(numel) <= ONE_SHOT_BYTES else "two_shot"


def two_shot_bytes(numel: int, codec: Codec, world: int) -> int:
    """Bytes of a two-shot all_reduce's payloads: all ranks sum equally many rows of a piece, some of them empty."""
    return sum(partition(len(part), world, codec).payload_bytes for part in chunks(numel, codec))


def all_reduce_one_shot(x: Tensor, codec: Codec, divisor: int, seed: int, group: dist.ProcessGroup) -> None:
    """Every rank sums all payloads."""
    for part, payloads in _gathered(x, codec, seed, group):
        decode_reduce_into(payloads, _cut(x, part), codec, divisor)


def all_reduce_two_shot(x: Tensor, codec: Codec, divisor: int, seed: int, group: dist.ProcessGroup) -> None:
    """Every rank sums one part, and all take the owner's coded sum."""
    world, rank = group.size(), group.rank()
    scattered, gathered = [], []
    for part in chunks(x.numel(), codec):
        shares = partition(len(part), world, codec)
        sent = _payload(x, shares.payload_bytes)
        used = codec.payload_bytes(len(part))
        sent[used:].zero_()  # never what lay in memory before
        encode_into(_cut(x, part), sent[:used], codec, _seed(seed, rank), part.start)
        received = torch.empty_like(sent)
        scattered.append((part, shares, received, dist.all_to_all_single(received, sent, group=group, async_op=True)))
    for part, shares, received, work in scattered:
        work.wait()
        owned = shares.owned(rank, len(part))
        total = torch.empty(len(owned), dtype=torch.float32, device=x.device)
        own = _payload(x, shares.share_bytes)
        used = codec.payload_bytes(len(owned))
        decode_reduce_into(received.view(world, -1)[:, :used], total, codec, divisor)
        own[used:].zero_()
        encode_into(total, own[:used], codec, _seed(seed, world + rank), part.start + owned.start)
        everyone = received  # its payloads are summed up: the same bytes take the sums
        gathered.append((part, everyone, dist.all_gather_single(everyone, own, group, async_op=True)))
    for part, everyone, work in gathered:
        work.wait()
        decode_into(everyone[: codec.payload_bytes(len(part))], _cut(x, part), codec)


def all_reduce_hierarchical(
    x: Tensor,
    codec: Codec,
    inside_codec: Codec,
    divisor: int,
    seed: int,
    across: dist.ProcessGroup,
    inside: dist.ProcessGroup,
) -> None:
    """Sum inside the fast groups, then across them, each rank its own part; then share the parts inside."""
    size = inside.size()
    shares = partition(x.numel(), size, inside_codec)
    own = shares.share
    padded = torch.zeros(shares.numel, dtype=torch.float32, device=x.device)
    padded[: x.numel()] = x
    total = torch.empty(own, dtype=torch.float32, device=x.device)
    reduce_scatter(total, padded, inside_codec, 1, seed, inside)
    run = all_reduce_one_shot if shots(own, codec, across.size()) == "one_shot" else all_reduce_two_shot
    run(total, codec, divisor, _seed(seed, -1 - inside.rank()), across)
    all_gather(padded, total, inside_codec, seed, inside)
    x.copy_(padded[: x.numel()])


def reduce_scatter(output: Tensor, x: Tensor, codec: Codec, divisor: int, seed: int, group: dist.ProcessGroup) -> None:
    """``x [W * n] -> output [n]``: the sum over ranks of their parts for this one."""
    world, numel = group.size(), output.numel()
    scattered = []
    for part in chunks(numel, codec):
        sent = _payload(x, world * codec.payload_bytes(len(part)))
        for rank, payload in enumerate(sent.view(world, -1)):
            source = x[rank * numel + part.start : rank * numel + part.stop]
            encode_into(source, payload, codec, _seed(seed, group.rank()), rank * numel + part.start)
        received = torch.empty_like(sent)
        scattered.append((part, received, dist.all_to_all_single(received, sent, group=group, async_op=True)))
    for part, received, work in scattered:
        work.wait()
        decode_reduce_into(received.view(world, -1), _cut(output, part), codec, divisor)


def all_gather(output: Tensor, x: Tensor, codec: Codec, seed: int, group: dist.ProcessGroup) -> None:
    """``x [n] -> output [W * n]``."""
    numel = x.numel()
    for part, payloads in _gathered(x, codec, seed, group):
        for rank, payload in enumerate(payloads):
            decode_into(payload, output[rank * numel + part.start : rank * numel + part.stop], codec)


def all_to_all(
    output: Tensor,
    x: Tensor,
    receives: Sequence[int],
    sends: Sequence[int],
    pieces: int,
    codec: Codec,
    seed: int,
    group: dist.ProcessGroup,
) -> None:
    """``sends[r]`` elements of `x` go to rank r, ``receives[r]`` of `output` come from it; each cut into `pieces`."""
    moved = []
    for piece in range(pieces):
        outgoing = list(_pieces(sends, piece, pieces, codec))
        incoming = list(_pieces(receives, piece, pieces, codec))
        out_bytes = [codec.payload_bytes(len(part)) for part in outgoing]
        in_bytes = [codec.payload_bytes(len(part)) for part in incoming]
        sent, received = _payload(x, sum(out_bytes)), _payload(x, sum(in_bytes))
        for part, payload in zip(outgoing, sent.split(out_bytes), strict=True):
            encode_into(_cut(x, part), payload, codec, _seed(seed, group.rank()), part.start)
        work = dist.all_to_all_single(received, sent, in_bytes, out_bytes, group, async_op=True)
        moved.append((incoming, received.split(in_bytes), work))
    for incoming, payloads, work in moved:
        work.wait()
        for part, payload in zip(incoming, payloads, strict=True):
            decode_into(payload, _cut(output, part), codec)


def broadcast(x: Tensor, src: int, codec: Codec, seed: int, group: dist.ProcessGroup) -> None:
    """All ranks, `src` (a rank of the group) among them, take what its payload decodes to."""
    sent = []
    for part in chunks(x.numel(), codec):
        payload = _payload(x, codec.payload_bytes(len(part)))
        if group.rank() == src:
            encode_into(_cut(x, part), payload, codec, seed, part.start)
        sent.append((part, payload, dist.broadcast(payload, group=group, group_src=src, async_op=True)))
    for part, payload, work in sent:
        work.wait()
        decode_into(payload, _cut(x, part), codec)


def _gathered(x: Tensor, codec: Codec, seed: int, group: dist.ProcessGroup) -> Iterator[tuple[range, Tensor]]:
    """Each piece of `x`, and every rank's payload of it, ``[W, payload_bytes]``; all are sent before any is awaited."""
    sent = []
    for part in chunks(x.numel(), codec):
        own = _payload(x, codec.payload_bytes(len(part)))
        encode_into(_cut(x, part), own, codec, _seed(seed, group.rank()), part.start)
        everyone = _payload(x, group.size() * own.numel())
        sent.append((part, everyone, dist.all_gather_single(everyone, own, group, async_op=True)))
    for part, everyone, work in sent:
        work.wait()
        yield part, everyone.view(group.size(), -1)


def _cut(x: Tensor, part: range) -> Tensor:
    return x[part.start : part.stop]


def _payload(x: Tensor, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=x.device)


def _pieces(splits: Sequence[int], piece: int, pieces: int, codec: Codec) -> Iterator[range]:
    """The element range of the given piece of every split: from a split's length alone, so both ends agree."""
    start = 0
    for length in splits:
        part = partition(length, pieces, codec).owned(piece, length)
        yield range(start + part.start, start + part.stop)
        start += length


def _seed(seed: int, stage: int) -> int:
    """A seed of its own for every rank and stage. Any mixing will do: the hash that reads it spreads the bits."""
    return (seed * 0x5851F42D + stage * 0x14057B7F + 1) & 0x7FFFFFFFFFFFFFFF
