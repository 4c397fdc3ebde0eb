"""What the collectives of a compiled program became, and what its processes really sent."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from qpass import comm
from qpass.comm.graph import inductor_pass
from qpass.comm.graph.collective import KINDS, is_other_collective, operator_of
from qpass.ir.record import NodeRecord

INT8 = comm.codec("int8")
ALL = {"comm": comm.Policy("int8", tuple(comm.policy.cost.FORMS), 0)}


class CompiledTraffic:
    """The collectives of every graph that was compiled while it watched: before, after, and the decisions.

    Graphs come from no cache meanwhile, which another rank may have filled: they would not be seen.
    """

    def __enter__(self) -> CompiledTraffic:
        self.caches = contextlib.ExitStack()
        self.caches.enter_context(torch._inductor.config.patch(fx_graph_cache=False))
        self.caches.enter_context(torch._functorch.config.patch(enable_autograd_cache=False))
        self.before: list[Counter[str]] = []
        self.after: list[Counter[str]] = []
        self.decisions: list[NodeRecord] = []
        self.original = inductor_pass.compress

        def compress(gm: Any, *args: Any, **kwargs: Any) -> Any:
            self.before.append(counted(gm))
            result = self.original(gm, *args, **kwargs)
            self.after.append(counted(result))
            self.decisions += inductor_pass.collectives(result)
            return result

        inductor_pass.compress = compress
        return self

    def __exit__(self, *_: Any) -> None:
        self.caches.close()
        inductor_pass.compress = self.original


def counted(gm: Any) -> Counter[str]:
    """How many collectives of each kind send tensors of which dtype, and of each other form there are."""
    found: Counter[str] = Counter()
    for node in gm.graph.nodes:
        if node.target in KINDS:
            found[f"{KINDS[node.target]} {str(node.args[0].meta['val'].dtype).removeprefix('torch.')}"] += 1
        elif is_other_collective(node):
            found[operator_of(node).overloadpacket.__name__] += 1
    return found


def value(rank: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


def rounded(x: Tensor) -> Tensor:
    return INT8.decode(INT8.encode(x), x.numel(), x.dtype).view(x.shape)


def bytes_sent() -> int:
    """Bytes that this process has sent over its TCP connections so far, as the kernel counts them.

    With gloo and a store in a file that is what collectives sent, and a header of 48 bytes for every message. What was
    sent a second time is left out: on a busy machine an acknowledgement is late, and the kernel repeats a segment.
    """
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as copy:
                if copy.family in (socket.AF_INET, socket.AF_INET6) and copy.type == socket.SOCK_STREAM:
                    info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, repeated = struct.unpack_from("=QQ", info, 200)  # tcp_info.tcpi_bytes_sent, _bytes_retrans
                    total += sent - repeated
        except FileNotFoundError:  # the descriptor that listed the folder
            continue
    return total


HEADERS = 2000
"""Bytes that gloo's headers may take: 48 for each message, of which hardly a program here sends more than 40."""


def check_sent(function: Callable[..., Any], *args: Any, payloads: int, headers: int = HEADERS) -> Any:
    """What a call returns; it sends that many bytes and the headers of its messages."""
    before = bytes_sent()
    result = function(*args)
    sent = bytes_sent() - before
    assert payloads <= sent <= payloads + headers, (payloads, sent)
    return result


def payload_bytes(*numels: int) -> int:
    return sum(map(INT8.payload_bytes, numels))
