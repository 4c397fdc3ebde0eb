"""Dead ranks: members of a group that have closed their connections, found without sending anything.

gloo notices at once when the process at the other end of a connection ends, and then refuses to receive from it. So a
receive that is never answered asks whether a rank is there. Its tag is used for nothing else, so it takes no data.
NCCL has nothing of the kind: there a dead rank is silent until the timeout.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

_TAG = 0x71A55


def dead_ranks(group: dist.ProcessGroup, ranks: Iterable[int]) -> dict[int, str]:
    """Those of ``ranks`` (ranks of the group) that gloo knows to be gone, and what it says; {} without gloo."""
    backends: list[Any] = [group._get_backend(device) for device in group._device_types]
    gloo = [backend for backend in backends if type(backend).__name__ == "ProcessGroupGloo"]
    found: dict[int, str] = {}
    for rank in ranks if gloo else ():
        try:
            gloo[0].recv([torch.empty(1)], rank, _TAG)
        except RuntimeError as error:
            found[rank] = str(error)
    return found
