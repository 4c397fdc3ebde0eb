"""A policy on symbolic sizes inside torch.compile: what it asks of a size becomes a guard of the compiled graph."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from compiled_traffic import CompiledTraffic
from qpass.comm.policy.policy import Policy


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


def test_one_graph_for_either_side_of_the_threshold() -> None:
    """So that ranks decide alike at every call, whatever sizes each has compiled for."""

    def function(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y

    with CompiledTraffic() as watch:
        compiled = torch.compile(function, backend="qpass", options={"comm": Policy("bf16", min_bytes=1 << 16)})
        for rows, graphs in ((100, 1), (163, 1), (164, 2), (500, 2), (120, 2), (163, 2), (900, 2)):
            x = torch.ones(rows, 100)
            torch._dynamo.mark_dynamic(x, 0)
            compiled(x)
            assert len(watch.after) == graphs, rows
    assert watch.after == [{"all_reduce float32": 1}, {"all_gather uint8": 1}]  # 400 bytes a row: 65,200 and 65,600
