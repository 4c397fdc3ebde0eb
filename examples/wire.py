"""What a process really sends to others, whoever sends it: the kernel counts the bytes of every TCP connection."""

from __future__ import annotations

import os
import socket
import sys

# tcpi_bytes_sent and tcpi_bytes_retrans of struct tcp_info, in <linux/tcp.h> since Linux 4.19
SENT, SENT_AGAIN = slice(200, 208), slice(208, 216)


def bytes_sent() -> int:
    """Bytes that the open TCP connections of this process have sent so far; 0 where the system is not Linux.

    Gloo's messages and a few small ones of the store that brought the ranks together.
    What a busy machine sends a second time is left out.
    """
    if sys.platform != "linux":
        return 0
    total = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(descriptor))) as connection:
                if connection.type == socket.SOCK_STREAM and connection.family in (socket.AF_INET, socket.AF_INET6):
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, SENT_AGAIN.stop)
                    sent, again = (int.from_bytes(info[part], sys.byteorder) for part in (SENT, SENT_AGAIN))
                    total += sent - again
        except OSError:  # a file, a pipe, or closed meanwhile
            continue
    return total
